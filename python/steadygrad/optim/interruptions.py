"""The ways in which a step ends before its update."""

from __future__ import annotations

from typing import Any


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
