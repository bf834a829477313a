"""What the callbacks share: the optimizer in a library's wrapper, its numbers, and the warning of a second clipper."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from steadygrad.optim.stabilized import StabilizedOptimizer


def stabilized(optimizer: Any) -> StabilizedOptimizer | None:
    """Returns the stabilized optimizer that ``optimizer`` is or wraps, or None.

    Args:
        optimizer: Any optimizer or wrapper with an attribute ``optimizer``, for instance accelerate's
            ``AcceleratedOptimizer`` or Lightning's ``LightningOptimizer``.
    """
    while optimizer is not None:
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(optimizer, StabilizedOptimizer) and not isinstance(
            inner, StabilizedOptimizer
        ):
            return optimizer
        optimizer = inner
    return None


def readings(optimizer: StabilizedOptimizer) -> dict[str, float]:
    """Returns numbers of the last step by name; an empty dict before the first step.

    They are ``grad_norm`` before the clip, ``skipped_steps`` and ``clipped_steps`` so far, and with telemetry also
    ``clipped_norm`` and ``limit`` if they are finite. On a CUDA device this waits for the step.
    """
    if not optimizer.has_stepped:
        return {}
    found = {
        "grad_norm": float(optimizer.grad_norm),
        "skipped_steps": float(optimizer.skipped_steps),
        "clipped_steps": float(optimizer.clipped_steps),
    }
    history = optimizer.telemetry
    if history is not None and len(history):
        last = {"clipped_norm": history.clipped_norm[-1], "limit": history.limit[-1]}
        found.update(
            {key: float(value) for key, value in last.items() if abs(value) < float("inf")}
        )
    return found


def name_parameters(
    optimizer: StabilizedOptimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> None:
    """Names the parameters if they have no names yet, and warns if one cannot be named."""
    groups = optimizer.param_groups
    if all("param_names" in group for group in groups):
        return
    try:
        optimizer.name_parameters(named_parameters)
    except ValueError as error:
        warnings.warn(f"{error}; reports number the parameters instead", stacklevel=3)


def clips(optimizer: StabilizedOptimizer) -> bool:
    """Returns whether the optimizer limits gradients itself."""
    return optimizer._options.clip is not None or any(
        group.get(key) is not None
        for group in optimizer.param_groups
        for key in ("max_norm", "clip_value")
    )


def warn_of_second_clipper(
    optimizer: StabilizedOptimizer, other: str, without: str, limit: float
) -> None:
    """Warns that gradients are clipped before the optimizer's own step sees them.

    Args:
        optimizer: The stabilized optimizer.
        other: What else clips, for instance ``"Trainer(gradient_clip_val=1.0)"``.
        without: What to do to remove the other clipper, as a part of a sentence.
        limit: The limit of the other clipper.
    """
    if clips(optimizer):
        what = f"two clippers: {other} clips the gradients before {_name(optimizer)} does"
        advice = f"Keep the optimizer's own and {without}"
    else:
        what = f"{other} clips the gradients before {_name(optimizer)} sees them"
        advice = f"Give the optimizer max_norm={limit!r} and {without}"
    warnings.warn(
        f"steadygrad: {what}, so that its grad_norm, policies and telemetry see gradients that were already clipped, "
        f"and the gradients are read in three more passes. {advice}.",
        stacklevel=3,
    )


def _name(optimizer: StabilizedOptimizer) -> str:
    inner = getattr(optimizer, "optimizer", None)
    outer = type(optimizer).__name__
    return outer if inner is None else f"{outer}({type(inner).__name__})"
