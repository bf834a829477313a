"""Means and rates with their 95 % confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

# Student's t at .975 for 1 to 30 degrees of freedom, and the normal distribution's value beyond.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z = 1.959964


@dataclass(frozen=True)
class Mean:
    r"""A mean with Student's interval, :math:`\bar x \pm t_{.975, n-1} s / \sqrt n`.

    Attributes:
        mean: of ``values``.
        low: lower end of the interval, None for a single value.
        high: upper end of the interval, None for a single value.
        values: what it is the mean of, in the order of the seeds.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Rate:
    """A share of runs with Wilson's score interval, which is right for few runs and for 0 and 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Attributes:
        count: how many.
        of: out of how many.
        share: ``count / of``.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    count: int
    of: int
    share: float
    low: float
    high: float


def mean(values: Iterable[float | None]) -> Mean | None:
    """Return the mean of the values that are finite numbers, None where there is none."""
    kept = tuple(value for value in values if value is not None and math.isfinite(value))
    if not kept:
        return None
    centre = statistics.fmean(kept)
    if len(kept) < 2:
        return Mean(centre, None, None, kept)
    freedom = len(kept) - 1
    # The tail beyond the table: the first term of Fisher's expansion, right to .001 there.
    t = _T[freedom - 1] if freedom <= len(_T) else _Z + (_Z**3 + _Z) / (4 * freedom)
    half = t * statistics.stdev(kept) / math.sqrt(len(kept))
    return Mean(centre, centre - half, centre + half, kept)


def rate(outcomes: Iterable[bool]) -> Rate:
    """Return the share of true outcomes, of which there must be at least one or a false one.

    Raises:
        ValueError: there are no outcomes.
    """
    seen = list(outcomes)
    if not seen:
        raise ValueError("rate: outcomes: expected at least one, got none")
    count, total = sum(seen), len(seen)
    share, squared = count / total, _Z * _Z
    scale = 1 + squared / total
    centre = (share + squared / (2 * total)) / scale
    spread = math.sqrt(share * (1 - share) / total + squared / (4 * total * total))
    half = _Z * spread / scale
    return Rate(count, total, share, max(0.0, centre - half), min(1.0, centre + half))
