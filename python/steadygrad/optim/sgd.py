"""Stochastic gradient descent with momentum (``torch.optim.SGD``), stabilized."""

from __future__ import annotations

import math

import torch

from steadygrad.optim.rule import Group, UpdateRule, group_number
from steadygrad.optim.stabilized import Stabilized


def _numbers(group: Group, where: str) -> dict[str, float]:
    return {
        "lr": group_number(group, where, "lr"),
        "momentum": group_number(group, where, "momentum"),
        "dampening": group_number(group, where, "dampening", low=-math.inf),
        "weight_decay": group_number(group, where, "weight_decay"),
        "nesterov": float(group["nesterov"]),
        "maximize": float(group["maximize"]),
    }


def _state_names(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


RULE = UpdateRule("sgd", torch.optim.SGD, False, _numbers, _state_names, takes_sparse=True)


class SGD(Stabilized, torch.optim.SGD):
    """``torch.optim.SGD`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = RULE
