"""RMSprop (``torch.optim.RMSprop``), stabilized."""

from __future__ import annotations

import torch

from steadygrad.optim.rule import Group, UpdateRule, group_number
from steadygrad.optim.stabilized import Stabilized


def _numbers(group: Group, where: str) -> dict[str, float]:
    return {
        "lr": group_number(group, where, "lr"),
        "alpha": group_number(group, where, "alpha"),
        "eps": group_number(group, where, "eps"),
        "weight_decay": group_number(group, where, "weight_decay"),
        "momentum": group_number(group, where, "momentum"),
        "centered": float(group["centered"]),
        "maximize": float(group["maximize"]),
    }


def _state_names(group: Group) -> tuple[str, ...]:
    names = ["square_avg"]
    if group["centered"]:
        names.append("grad_avg")
    if group["momentum"] != 0:
        names.append("momentum_buffer")
    return tuple(names)


RULE = UpdateRule("rmsprop", torch.optim.RMSprop, True, _numbers, _state_names)


class RMSprop(Stabilized, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = RULE
