"""Accumulates the gradients of micro-batches for the next step: their sums, and the number to divide them by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steadygrad.memory import is_asynchronous
from steadygrad.optim.in_place import Closure
from steadygrad.optim.options import HALF_DTYPES, checked_number


class Accumulated:
    """Holds the micro-batches since the last step.

    Gradients in fp32 and fp64, and sparse ones, stay in ``.grad``, where the backward pass sums them. Gradients in half
    precision are moved from ``.grad`` to sums in fp32 after every micro-batch.

    Attributes:
        sums: The sum of the gradients of each parameter whose gradients have half precision.
        divisor: What the sums are divided by, 1 before the first micro-batch; on a device if a weight was there.
    """

    def __init__(self) -> None:
        self.sums: dict[Tensor, Tensor] = {}
        self.divisor: float | Tensor = 1.0
        self._is_empty = True
        self._is_open = False
        self._failure: str | None = None

    def check_closed(self, function: str) -> None:
        """Refuses a call inside a micro-batch, which would take or drop half of it."""
        if self._is_open:
            raise RuntimeError(
                f"{function}: accumulate: expected a call after the micro-batch, got one inside"
            )

    def check_ready(self, closure: Closure | None, found_inf: Any) -> None:
        """Refuses a step that would not be by the mean; ``found_inf`` comes from a scaler that sees only ``.grad``."""
        self.check_closed("step")
        self._check_unbroken("step")
        if self._is_empty:
            return
        if closure is not None:
            raise RuntimeError(
                "step: closure: expected None after steadygrad.accumulate, whose gradients it would replace, "
                f"got {type(closure).__name__}"
            )
        if not isinstance(self.divisor, Tensor) and self.divisor <= 0:
            raise ValueError(
                f"step: accumulate: expected weights whose sum is more than 0, got {self.divisor}"
            )
        if self.sums and found_inf is not None:
            raise RuntimeError(
                "step: found_inf: expected that of steadygrad.GradScaler, since steadygrad.accumulate sums "
                f"half-precision gradients apart from .grad, got {found_inf!r}"
            )
        if any(param.grad is not None for param in self.sums):
            raise RuntimeError(
                "step: accumulate: expected every backward inside a micro-batch, got a gradient from outside, or "
                "a parameter whose dtype has changed since; zero_grad() drops it and all micro-batches"
            )

    def _check_unbroken(self, function: str) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"{function}: accumulate: expected complete micro-batches, got one that ended with {self._failure}; "
                "call zero_grad() and start anew"
            )

    @torch.no_grad()
    def begin(self, params: Sequence[Tensor], decay: float) -> None:
        """Begins a micro-batch, before its backward pass: multiplies what came before by ``decay``."""
        if self._is_open:
            raise RuntimeError(
                "accumulate: optimizer: expected one micro-batch at a time, got one inside another"
            )
        self._check_unbroken("accumulate")
        self._is_open = True
        if decay == 1 or self._is_empty:
            return
        for param in params:
            total = self.sums.get(param, param.grad)
            if total is not None:
                total.mul_(decay)
        self.divisor = self.divisor * decay

    @torch.no_grad()
    def complete(self, params: Sequence[Tensor], weight: float | Tensor) -> None:
        """Completes a micro-batch, after its backward pass: moves gradients in half precision to the sums."""
        # Hooks would come too early: DistributedDataParallel writes the reduced gradients at the end of backward.
        for param in params:
            grad = param.grad
            if grad is None or grad.dtype not in HALF_DTYPES or grad.layout != torch.strided:
                continue
            if param in self.sums:
                self.sums[param].add_(grad)
            else:
                self.sums[param] = grad.detach().to(torch.float32)
            param.grad = None
        self.divisor = weight if self._is_empty else self.divisor + weight
        self._is_empty = self._is_open = False

    def fail(self, error: BaseException) -> None:
        """Gives up the sums after an exception inside a micro-batch, since its part cannot be taken out again."""
        self.sums = {}
        self._is_open = False
        self._failure = type(error).__name__

    @torch.no_grad()
    def hand_over(self) -> None:
        """Moves sums that were changed to the update's gradients to ``.grad``, in the dtype that it has to have."""
        for param, total in self.sums.items():
            # From torch 2.11 on, the gradient's dtype may differ from the parameter's; None allows any.
            param.grad = total.to(getattr(param, "grad_dtype", None) or param.dtype)
        self.sums, self.divisor, self._is_empty = {}, 1.0, True

    def gradients(self, param_groups: list[dict[str, Any]]) -> list[Tensor | None] | None:
        """Returns a gradient per parameter, from the sums if it has one there; None if ``.grad`` has all of them."""
        if not self.sums:
            return None
        return [self.sums.get(p, p.grad) for group in param_groups for p in group["params"]]


def checked_weight(weight: float | Tensor) -> float | Tensor:
    """Returns a weight as a finite number of at least 0; a number on a device is not checked, which would wait."""
    if isinstance(weight, Tensor) and weight.numel() == 1 and is_asynchronous(weight.device):
        return weight.detach().reshape(()).to(torch.float32)
    return checked_number("accumulate: weight", weight)
