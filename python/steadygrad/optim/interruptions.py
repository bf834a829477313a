"""The ways in which a step ends before its update."""

from __future__ import annotations

from typing import Any

from steadygrad import _kernels
from steadygrad.optim.device_steps import DeviceReport
from steadygrad.optim.parameter_groups import parameter_names


class NonfiniteGradientError(RuntimeError):
    """Raised under ``nonfinite="raise"``; nothing was changed."""


class StepSkipped(Exception):
    """Leaves the wrapped optimizer's ``step`` before it changes anything."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss


class CannotFuse(Exception):
    """Leaves the fused path after the closure ran, when the gradients it made have no fused rule."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss


def nonfinite_message(
    param_groups: list[dict[str, Any]],
    indices: list[int],
    report: _kernels.StepReport | DeviceReport,
) -> str:
    """Names the parameters whose gradients are not finite; ``indices`` are those of the report's tensors."""
    names = parameter_names(param_groups)
    found = [
        f"{names[index]} ({count})"
        for index, count in zip(indices, report.nonfinite, strict=False)
        if count
    ]
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return (
        f"step: gradients: expected finite elements, got {report.nonfinite_count} non-finite ones in "
        f"{shown or 'gradients of other ranks'}; parameters, state and step counters were left as they are"
    )
