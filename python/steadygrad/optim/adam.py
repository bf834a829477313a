"""Adam and AdamW (``torch.optim``), stabilized; they differ in where the weight decay goes."""

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

ADAM_RULE = UpdateRule("adam", torch.optim.Adam)
ADAMW_RULE = UpdateRule("adam", torch.optim.AdamW)


class Adam(Stabilized, torch.optim.Adam):
    """``torch.optim.Adam`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = ADAM_RULE

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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


class AdamW(Stabilized, torch.optim.AdamW):
    """``torch.optim.AdamW`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = ADAMW_RULE

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
