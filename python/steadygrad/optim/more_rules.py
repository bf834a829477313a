"""Adamax, NAdam, RAdam, Adadelta, ASGD and Rprop (``torch.optim``), and Lion: what the fused step knows of them."""

from __future__ import annotations

import torch

from steadygrad.optim.options import checked_number
from steadygrad.optim.rule import Group, UpdateRule, group_number


def _betas(group: Group, where: str) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    return {
        "beta1": checked_number(where + "betas[0]", beta1, below=1.0),
        "beta2": checked_number(where + "betas[1]", beta2, below=1.0),
    }


def _plain(*keys: str):
    def numbers(group: Group, where: str) -> dict[str, float]:
        found = {key: group_number(group, where, key) for key in keys}
        if "betas" in group:
            found |= _betas(group, where)
        for flag in ("maximize", "decoupled_weight_decay"):
            if flag in group:
                found[flag] = float(group[flag])
        return found

    return numbers


def _rprop_numbers(group: Group, where: str) -> dict[str, float]:
    (etaminus, etaplus), (least, most) = group["etas"], group["step_sizes"]
    return {
        "lr": group_number(group, where, "lr"),
        "etaminus": checked_number(where + "etas[0]", etaminus),
        "etaplus": checked_number(where + "etas[1]", etaplus),
        "step_size_min": checked_number(where + "step_sizes[0]", least),
        "step_size_max": checked_number(where + "step_sizes[1]", most),
        "maximize": float(group["maximize"]),
    }


def _names(*names: str):
    return lambda group: names


_MOMENTS = _names("exp_avg", "exp_avg_sq")
MORE_RULES = [
    UpdateRule("adamax", torch.optim.Adamax, True, _plain("lr", "eps", "weight_decay"), _names("exp_avg", "exp_inf")),
    UpdateRule("nadam", torch.optim.NAdam, True, _plain("lr", "eps", "weight_decay", "momentum_decay"), _MOMENTS,
        initial_value=lambda group, name: float(name == "mu_product"), numbers_of_state=("mu_product",)),
    UpdateRule("radam", torch.optim.RAdam, True, _plain("lr", "eps", "weight_decay"), _MOMENTS),
    UpdateRule("adadelta", torch.optim.Adadelta, True, _plain("lr", "rho", "eps", "weight_decay"), _names("square_avg", "acc_delta")),
    UpdateRule("asgd", torch.optim.ASGD, True, _plain("lr", "lambd", "alpha", "t0", "weight_decay"), _names("ax"),
        initial_value=lambda group, name: {"eta": float(group["lr"]), "mu": 1.0}.get(name, 0.0), numbers_of_state=("eta", "mu")),
    UpdateRule("rprop", torch.optim.Rprop, True, _rprop_numbers, _names("prev", "step_size"),
        initial_value=lambda group, name: float(group["lr"]) if name == "step_size" else 0.0),
]
