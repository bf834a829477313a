"""The base class of policies that run in the kernels: their numbers, and how their state is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steadygrad import _kernels
from steadygrad.arguments import checked_count, checked_number

Scope = Literal["global", "group", "tensor"]
Described = _kernels.ClipPolicy | _kernels.SpikePolicy

# The column of a row at which the learnt numbers begin, after the last step's coefficient and limit.
LEARNT = _kernels.POLICY_ROW["learnt"]


@dataclass(frozen=True)
class KernelPolicy:
    """A policy that the kernels run; its state is one row of float64 numbers per clip scope.

    ``csrc/core/policy.h`` defines the rows: the last coefficient and limit, then counts and learnt numbers.
    """

    @property
    def for_kernels(self) -> Described | None:
        """Returns what a plan takes, or None if a constant limit is all there is to the policy."""
        return None

    @property
    def row_size(self) -> int:
        """Returns the number of state numbers per scope."""
        kernels = self.for_kernels
        return 0 if kernels is None else kernels.row_size

    def saved(self, row: list[float]) -> list[float]:
        """Returns the part of a row that a state dict holds."""
        return []

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """Returns the row that these numbers were saved from, or None if this policy cannot have saved them."""
        return None if saved else [0.0] * self.row_size

    def _number(self, name: str, **limits: Any) -> float:
        """Checks an argument that is a number, and stores it as a Python float."""
        where = f"{type(self).__name__}: {name}"
        number = checked_number(where, getattr(self, name), **limits)
        object.__setattr__(self, name, number)
        return number

    def _count(self, name: str, low: int) -> int:
        """Checks an argument that is an int of at least ``low``, and stores it as a Python int."""
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
        """Checks an argument that is a limit, and returns infinity for None."""
        if getattr(self, name) is None:
            return math.inf
        return self._number(name, finite=False)
