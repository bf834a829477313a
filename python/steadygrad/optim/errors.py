"""The error of a step with non-finite gradients, and its message."""

from __future__ import annotations

from typing import Any

from steadygrad.parameter_names import parameter_names


class NonfiniteGradientError(RuntimeError):
    """Raised by a step with non-finite gradients under ``nonfinite="raise"``; nothing was changed."""


def nonfinite_message(
    param_groups: list[dict[str, Any]],
    indices: list[int],
    counts: list[int],
    total: int,
) -> str:
    """Names the parameters whose gradients are not finite.

    Args:
        param_groups: The param groups of the optimizer.
        indices: Indices of the parameters that took part, in the order of the groups.
        counts: Number of non-finite elements of each of them.
        total: Number of non-finite elements on all ranks.
    """
    names = parameter_names(param_groups)
    found = [
        f"{names[index]} ({count})" for index, count in zip(indices, counts, strict=False) if count
    ]
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return (
        f"step: gradients: expected finite elements, got {total} non-finite ones in "
        f"{shown or 'gradients of other ranks'}; parameters, state and step counters were left as they are"
    )
