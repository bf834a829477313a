"""Adamax, NAdam, RAdam, Adadelta, ASGD and Rprop (``torch.optim``): what the fused step knows of them."""

from __future__ import annotations

import torch

from steadygrad.optim.rule import Group, UpdateRule


def _mu_product(group: Group, name: str) -> float:
    return 1.0 if name == "mu_product" else 0.0


def _eta_and_mu(group: Group, name: str) -> float:
    return {"eta": float(group["lr"]), "mu": 1.0}.get(name, 0.0)


def _step_size(group: Group, name: str) -> float:
    return float(group["lr"]) if name == "step_size" else 0.0


MORE_RULES = [
    UpdateRule("adamax", torch.optim.Adamax),
    UpdateRule("nadam", torch.optim.NAdam, initial_value=_mu_product),
    UpdateRule("radam", torch.optim.RAdam),
    UpdateRule("adadelta", torch.optim.Adadelta),
    UpdateRule("asgd", torch.optim.ASGD, initial_value=_eta_and_mu),
    UpdateRule("rprop", torch.optim.Rprop, initial_value=_step_size),
]
