"""Adagrad (``torch.optim.Adagrad``), stabilized."""

from __future__ import annotations

import torch

from steadygrad.optim.rule import Group, UpdateRule, group_number
from steadygrad.optim.stabilized import Stabilized


def _numbers(group: Group, where: str) -> dict[str, float]:
    return {
        "lr": group_number(group, where, "lr"),
        "lr_decay": group_number(group, where, "lr_decay"),
        "eps": group_number(group, where, "eps"),
        "weight_decay": group_number(group, where, "weight_decay"),
        "maximize": float(group["maximize"]),
    }


def _state_names(group: Group) -> tuple[str, ...]:
    return ("sum",)


def _initial_value(group: Group) -> float:
    return float(group["initial_accumulator_value"])


RULE = UpdateRule(
    "adagrad",
    torch.optim.Adagrad,
    True,
    _numbers,
    _state_names,
    takes_sparse=True,
    initial_value=_initial_value,
)


class Adagrad(Stabilized, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = RULE
