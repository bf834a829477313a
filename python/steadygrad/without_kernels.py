"""Stands in for the compiled extension if there is none, with the names of all that runs without kernels.

The functions refuse every tensor, so that their callers use torch's operations (:mod:`steadygrad.composite`); the error
says if those cannot take a tensor either. There is no ``Plan``: steps are taken by
:class:`steadygrad.optim.composite_plan.CompositePlan`. ``_kernels.pyi`` documents the names, and a test checks that
both modules agree on every number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from steadygrad.arguments import checked_count, checked_number

try:
    VERSION = metadata.version("steadygrad")
except metadata.PackageNotFoundError:  # The checkout was never installed.
    VERSION = "0+unknown"

# The reason why there is no extension, set when the import of the package has found it.
reason = ""

LIMITS = ("max_norm", "clip_value", "l1", "l2")
CLIPPING = "clipping"
COUNTERS = ("skipped_steps", "clipped_steps")
ROUNDED_STEPS = "rounded_steps"
POLICY_ROW = {
    "coefficient": 0,
    "limit": 1,
    "norm": 2,
    "learnt": 2,
    "count": 2,
    "oldest": 3,
    "norms": 4,
}
TELEMETRY_COLUMNS = {"norm": 0, "clipped_norm": 1, "limit": 2, "flags": 3, "nonfinite": 4}
TELEMETRY_FLAGS = {"clipped": 1, "skipped": 2, "refused": 4, "spiked": 8}
SCOPE_COLUMNS = ("small", "medium", "large", "nonfinite", "nan")

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


def build_info() -> dict[str, object]:
    """Returns the build's description, which names no backend."""
    return {"version": VERSION, "backends": [], "cuda": {"compiled": False, "devices": []}}


def launch_count() -> int:
    """Returns 0, since no kernel is launched."""
    return 0


def is_asynchronous(device_type: str) -> bool:
    """Returns False, since no kernel runs asynchronously."""
    return False


# -- functions ------------------------------------------------------------------------------------


def grad_norm(
    tensors: list[Tensor], norm_type: float, output: Any, allocate: Any, reduction: Any = None
) -> tuple[float, int, bool]:
    """Refuses the tensors; an empty list has norm 0."""
    _check_norm_type("get_total_norm", norm_type)
    _refuse("get_total_norm", "tensors", "", tensors, reduction)
    return 0.0, 0, False


def clip_grad_norm_(
    grads: list[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    output: Any,
    allocate: Any,
    reduction: Any = None,
) -> tuple[float, int, bool]:
    """Refuses the gradients; an empty list has norm 0."""
    check_not_negative("clip_grad_norm_", "max_norm", max_norm)
    _check_norm_type("clip_grad_norm_", norm_type)
    _refuse("clip_grad_norm_", "parameters.grad", "", grads, reduction)
    return 0.0, 0, False


def clip_grads_with_norm_(
    grads: list[Tensor], max_norm: float, total_norm: float | Tensor, allocate: Any
) -> None:
    """Refuses the gradients."""
    check_not_negative("clip_grads_with_norm_", "max_norm", max_norm)
    _refuse("clip_grads_with_norm_", "parameters.grad", "", grads)


def clip_grad_value_(grads: list[Tensor], clip_value: float, allocate: Any) -> None:
    """Refuses the gradients."""
    check_not_negative("clip_grad_value_", "clip_value", clip_value)
    _refuse("clip_grad_value_", "parameters.grad", "", grads)


def add_penalty_(
    params: list[Tensor],
    grads: list[Tensor],
    l1: float,
    l2: float,
    value: Tensor | None,
    allocate: Any,
) -> float:
    """Refuses the parameters and gradients; an empty list has penalty 0."""
    check_not_negative("add_penalty_", "l1", l1)
    check_not_negative("add_penalty_", "l2", l2)
    _refuse("add_penalty_", "params", ".grad", grads)
    _refuse("add_penalty_", "params", "", params)
    return 0.0


def soft_threshold_(params: list[Tensor], amount: float, allocate: Any) -> None:
    """Refuses the parameters."""
    check_not_negative("soft_threshold_", "amount", amount)
    _refuse("soft_threshold_", "params", "", params)


def check_not_negative(function: str, name: str, value: float) -> None:
    """Refuses a limit or weight that is negative or NaN.

    Raises:
        ValueError: ``value`` is negative or NaN.
    """
    if not value >= 0:
        raise ValueError(f"{function}: {name}: expected a number >= 0, got {value}")


def _check_norm_type(function: str, norm_type: float) -> None:
    if math.isnan(norm_type):
        raise ValueError(f"{function}: norm_type: expected a number, got nan")


def _refuse(
    function: str, argument: str, attribute: str, tensors: Sequence[Any], reduction: Any = None
) -> None:
    for i, tensor in enumerate(tensors):
        check_tensor(f"{function}: {argument}[{i}]{attribute}", tensor)
    if tensors or reduction is not None:
        raise TypeError(f"{function}: expected the compiled extension, got a package without it")


def check_tensor(where: str, tensor: Any) -> None:
    """Refuses a tensor that neither kernels nor torch's operations can take.

    Raises:
        TypeError: ``tensor`` is not a dense tensor of a supported dtype.
    """
    expected = "a dense tensor of float32, float64, bfloat16, float16 or a complex dtype"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected {expected}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        raise TypeError(
            f"{where}: expected {expected}, got one of shape {tuple(tensor.shape)}, dtype {tensor.dtype}, "
            f"layout {tensor.layout}, device {tensor.device}"
        )


# -- arguments of a step --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Holds rows of sums, the tensors that this process counts, and functions that combine rows and ask a policy."""

    rows: Tensor
    counted: Tensor
    reduce: Callable[[], None] | None = None
    ask_policy: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Holds the tensors that a step is recorded in."""

    rows: Tensor
    recorded: Tensor
    history: int
    per_tensor: bool


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Holds the scale that a ``GradScaler`` and accumulated gradients divide by."""

    unscale: float = 1.0
    found_inf: bool = False
    grad_scale_tensor: Tensor | None = None
    found_inf_tensor: Tensor | None = None


_ROW_SIZES: dict[str, Callable[[int], int]] = {
    "percentile": lambda window: POLICY_ROW["norms"] + 2 * window,
    "zscore": lambda window: POLICY_ROW["learnt"] + 3,
    "relative": lambda window: POLICY_ROW["learnt"] + 2,
    "damp": lambda window: POLICY_ROW["learnt"],
    "given": lambda window: POLICY_ROW["norm"] + 1,
    "adaptive": lambda window: POLICY_ROW["learnt"],
}


class ClipPolicy:
    """Holds the length of a scope's row; the step asks the optimizer's own policy for the rest."""

    def __init__(self, kind: str, *, window: int = 0, **numbers: float) -> None:
        self.row_size = _ROW_SIZES[kind](window)


class SpikePolicy:
    """Holds the length of the row."""

    def __init__(self, *, sigma: float, window: int) -> None:
        self.row_size = POLICY_ROW["norms"] + window


# -- param groups ---------------------------------------------------------------------------------


def check_param_groups(
    rule: str,
    param_groups: list[dict[str, Any]],
    defaults: Mapping[str, float | None],
    clips_units: bool,
    device: torch.device | None,
) -> None:
    """Refuses limits and counters that no step can take; the optimizer's own step checks its other numbers."""
    for i, group in enumerate(param_groups):
        where = f"step: param_groups[{i}]: "
        for counter in COUNTERS:
            checked_count(where + counter, group.get(counter, 0))
        for key in (*LIMITS, *((CLIPPING,) if clips_units else ())):
            value = group.get(key, defaults[key])
            may_be_none = key not in ("l1", "l2")
            if value is not None or not may_be_none:
                checked_number(where + key, value, finite=not may_be_none)


def count_steps(param_groups: list[dict[str, Any]], counter: str, steps: int) -> None:
    """Sets the counter of every param group to the largest one plus ``steps``."""
    most = max((group.get(counter, 0) for group in param_groups), default=0)
    for group in param_groups:
        group[counter] = most + steps
