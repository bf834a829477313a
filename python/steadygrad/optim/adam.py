"""Adam and AdamW (``torch.optim``), stabilized; they differ in where the weight decay goes."""

from __future__ import annotations

import torch

from steadygrad.optim.options import checked_number
from steadygrad.optim.rule import Group, UpdateRule, group_number
from steadygrad.optim.stabilized import Stabilized


def _numbers(group: Group, where: str) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    return {
        "lr": group_number(group, where, "lr"),
        "beta1": checked_number(where + "betas[0]", beta1, below=1.0),
        "beta2": checked_number(where + "betas[1]", beta2, below=1.0),
        "eps": group_number(group, where, "eps"),
        "weight_decay": group_number(group, where, "weight_decay"),
        "amsgrad": float(group["amsgrad"]),
        "maximize": float(group["maximize"]),
        "decoupled_weight_decay": float(group["decoupled_weight_decay"]),
    }


def _state_names(group: Group) -> tuple[str, ...]:
    names = ("exp_avg", "exp_avg_sq")
    return (*names, "max_exp_avg_sq") if group["amsgrad"] else names


ADAM_RULE = UpdateRule("adam", torch.optim.Adam, True, _numbers, _state_names)
ADAMW_RULE = UpdateRule("adam", torch.optim.AdamW, True, _numbers, _state_names)


class Adam(Stabilized, torch.optim.Adam):
    """``torch.optim.Adam`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = ADAM_RULE


class AdamW(Stabilized, torch.optim.AdamW):
    """``torch.optim.AdamW`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = ADAMW_RULE
