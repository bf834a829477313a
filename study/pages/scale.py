"""Axes: where a value is on them, and which values are written beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis.

    Attributes:
        low: value at its start; above 0 on a logarithmic one.
        high: value at its end, above ``low``.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        """Checks the ends.

        Raises:
            ValueError: they are not in order, not finite, or not above 0 on a logarithmic axis.
        """
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Scale: expected finite low < high, got {self.low}, {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"Scale: low: expected a number above 0, got {self.low}")

    @classmethod
    def around(
        cls, values: Iterable[float], *, log: bool = False, default: tuple[float, float]
    ) -> Scale:
        """Make the axis that holds all finite values (above 0 on a logarithmic one).

        Args:
            values: what it has to hold.
            log: whether it is logarithmic; its ends are then a little beyond the values.
            default: its ends where there are no values, or only one.
        """
        kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if not kept:
            return cls(*default, log)
        low, high = min(kept), max(kept)
        if log:
            return cls(low / 1.2, high * 1.2, log)
        if low == high:
            low, high = min(low, default[0]), max(high, default[1])
        return cls(low, high, log) if low < high else cls(low - 1, high + 1, log)

    def place(self, value: float) -> float:
        """Return where ``value`` is, 0 at the start and 1 at the end; beyond, the nearer end."""
        if math.isnan(value):
            return 0.0
        if self.log:
            if value <= 0:
                return 0.0
            if math.isinf(value):
                return 1.0
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self, most: int) -> list[float]:
        """Return round values on the axis, ``most`` at most (but two where one would say little)."""
        return self._log_ticks(most) if self.log else self._linear_ticks(most)

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10, 20) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        decades = last - first + 1
        if decades >= 3:
            stride = math.ceil(decades / most)
            return [10.0**k for k in range(first, last + 1) if k % stride == 0]
        for mantissas in ((1, 2, 5), (1, 3), (1,)):
            ticks = [
                m * 10.0**k
                for k in range(first - 1, last + 1)
                for m in mantissas
                if self.low * 0.999 <= m * 10.0**k <= self.high * 1.001
            ]
            if len(ticks) <= most:
                return ticks
        return ticks
