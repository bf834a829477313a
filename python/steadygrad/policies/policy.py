"""What every policy tells the step: its numbers for the kernels, and how its state is kept and saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steadygrad import _kernels
from steadygrad.arguments import checked_count, checked_number

Scope = Literal["global", "group", "tensor"]
Described = _kernels.ClipPolicy | _kernels.SpikePolicy

# Where in a row begins what was learnt: after the last step's coefficient and limit.
LEARNT = _kernels.POLICY_ROW["learnt"]


@dataclass(frozen=True)
class KernelPolicy:
    """A policy that the kernels know, by its parameters; its state is one row of float64 numbers per clip scope.

    The rows are those of ``csrc/core/policy.h``: the last coefficient and limit, then counts and what was learnt.
    """

    @property
    def for_kernels(self) -> Described | None:
        """What a plan takes; None where a constant limit says it all."""
        return None

    @property
    def row_size(self) -> int:
        """Numbers of state per scope."""
        kernels = self.for_kernels
        return 0 if kernels is None else kernels.row_size

    def saved(self, row: list[float]) -> list[float]:
        """What of a row a state dict keeps."""
        return []

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """The row again; None where the numbers cannot be those of such a policy."""
        return None if saved else [0.0] * self.row_size

    def _number(self, name: str, **limits: Any) -> float:
        """Checks a parameter that is a number; from then on it is a Python float."""
        where = f"{type(self).__name__}: {name}"
        number = checked_number(where, getattr(self, name), **limits)
        object.__setattr__(self, name, number)
        return number

    def _count(self, name: str, low: int) -> int:
        """Checks a parameter that is an int of at least ``low``; from then on it is a Python int."""
        count = checked_count(f"{type(self).__name__}: {name}", getattr(self, name), low=low)
        object.__setattr__(self, name, count)
        return count

    def _fraction(self, name: str) -> float:
        return self._number(name, below=1.0)

    def _positive(self, name: str) -> float:
        number = self._number(name)
        if number == 0:
            raise ValueError(
                f"{type(self).__name__}: {name}: expected a finite number > 0, got {number!r}"
            )
        return number

    def _cap(self, name: str) -> float:
        """A limit, or None for no limit."""
        if getattr(self, name) is None:
            return math.inf
        return self._number(name, finite=False)
