"""What a stabilized step does besides the update: its options, checked when made and at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from steadygrad.arguments import checked_number as checked_number
from steadygrad.optim.param_storage import ROUNDED_STEPS, ParamStorage, Rounding

PenaltyOrder = Literal["before_clip", "after_clip"]
L1Mode = Literal["subgradient", "proximal"]
ClipScope = Literal["global", "group", "tensor"]
Nonfinite = Literal["skip", "zero", "raise", "propagate"]

COUNTERS = ("skipped_steps", "clipped_steps")


def _checked_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Stabilizer: {name}: expected one of {listed}, got {value!r}")


@dataclass(frozen=True)
class StabilizerOptions:
    """The keyword arguments of :class:`steadygrad.Stabilizer`, which documents them."""

    max_norm: float | None = None
    norm_type: float = 2.0
    clip_value: float | None = None
    l1: float = 0.0
    l2: float = 0.0
    penalty_order: PenaltyOrder = "before_clip"
    l1_mode: L1Mode = "subgradient"
    clip_scope: ClipScope = "global"
    nonfinite: Nonfinite = "skip"
    write_grads: bool = False
    state_dtype: torch.dtype | None = None
    rounding: Rounding = "nearest"
    rounding_seed: int = 0
    reduce_norm: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StabilizerOptions:
        """Itself: nothing in it changes, and process groups cannot be copied."""
        return self

    def __post_init__(self) -> None:
        """Checks every option."""
        self.group_numbers({}, "Stabilizer: ")
        norm_type = checked_number("Stabilizer: norm_type", self.norm_type, finite=False)
        if norm_type == 0:
            raise ValueError(
                "Stabilizer: norm_type: expected a number > 0: counting non-zeros limits nothing, "
                f"got {self.norm_type!r}"
            )
        _checked_choice("penalty_order", self.penalty_order, get_args(PenaltyOrder))
        _checked_choice("l1_mode", self.l1_mode, get_args(L1Mode))
        _checked_choice("clip_scope", self.clip_scope, get_args(ClipScope))
        _checked_choice("nonfinite", self.nonfinite, get_args(Nonfinite))
        _checked_choice("rounding", self.rounding, get_args(Rounding))
        self.storage.check()

    def group_defaults(self) -> dict[str, Any]:
        """The keys that every param group carries, so that they can differ per group and be saved."""
        return {
            "max_norm": self.max_norm,
            "clip_value": self.clip_value,
            "l1": self.l1,
            "l2": self.l2,
            **dict.fromkeys(COUNTERS, 0),
            **({ROUNDED_STEPS: 0} if self.storage.is_stochastic else {}),
        }

    def group_numbers(self, group: Mapping[str, Any], where: str) -> dict[str, float]:
        """The group's limits and penalties as the kernels take them: no limit is infinity."""
        numbers = {}
        for key in ("max_norm", "clip_value"):
            value = group.get(key, getattr(self, key))
            numbers[key] = (
                math.inf if value is None else checked_number(where + key, value, finite=False)
            )
        for key in ("l1", "l2"):
            numbers[key] = checked_number(where + key, group.get(key, getattr(self, key)))
        return numbers

    def kernel_options(self) -> dict[str, object]:
        """What stays the same from step to step, for a plan."""
        return {
            "norm_type": float(self.norm_type),
            "clip_scope": self.clip_scope,
            "nonfinite": self.nonfinite,
            "penalty_order": self.penalty_order,
            "l1_mode": self.l1_mode,
            "write_grads": bool(self.write_grads),
            "rounding": self.rounding,
            "rounding_seed": self.rounding_seed,
        }

    @property
    def storage(self) -> ParamStorage:
        """How half-precision parameters and their state are stored."""
        return ParamStorage(self.state_dtype, self.rounding, self.rounding_seed)
