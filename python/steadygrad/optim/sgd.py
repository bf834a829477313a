"""Stochastic gradient descent with momentum (``torch.optim.SGD``), stabilized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steadygrad.optim.options import ClipScope, L1Mode, Nonfinite, PenaltyOrder
from steadygrad.optim.param_storage import Rounding
from steadygrad.optim.rule import UpdateRule
from steadygrad.optim.stabilized import Stabilized, written_out
from steadygrad.policies import ClipPolicy, Policy, SkipSpikes
from steadygrad.telemetry.settings import Level, Telemetry

RULE = UpdateRule("sgd", torch.optim.SGD, takes_sparse=True)


class SGD(Stabilized, torch.optim.SGD):
    """``torch.optim.SGD`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = RULE

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip: Policy | ClipPolicy | None = None,
        skip: SkipSpikes | None = None,
        norm_type: float = 2.0,
        clip_value: float | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        penalty_order: PenaltyOrder = "before_clip",
        l1_mode: L1Mode = "subgradient",
        clip_scope: ClipScope | None = None,
        nonfinite: Nonfinite = "skip",
        write_grads: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        rounding_seed: int = 0,
        reduce_norm: Any = None,
        telemetry: Telemetry | Level | None = "tensor",
    ) -> None: ...
