"""Policies that look at the last norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steadygrad import _kernels
from steadygrad.policies.clip_policy import KernelClipPolicy
from steadygrad.policies.policy import LEARNT, KernelPolicy

# How many norms there are, the place of the oldest one, and where they begin.
_COUNT, _OLDEST, _BEFORE_NORMS = (
    _kernels.POLICY_ROW[name] for name in ("count", "oldest", "norms")
)


def _restored_norms(saved: Sequence[float], window: int) -> list[float] | None:
    if not saved:
        return [0.0] * (_BEFORE_NORMS + window)
    oldest, *norms = saved
    count = len(norms)
    # As a full ring the oldest may be anywhere; before, the next place is the first free one.
    fits = 0 <= oldest < window and oldest == int(oldest) and count <= window
    if not fits or (count < window and oldest != count):
        return None
    return [*[0.0] * LEARNT, float(count), float(oldest), *norms, *[0.0] * (window - count)]


def _saved_norms(row: list[float]) -> list[float]:
    count = int(row[_COUNT])
    return [row[_OLDEST], *row[_BEFORE_NORMS : _BEFORE_NORMS + count]] if count else []


@dataclass(frozen=True)
class ClipPercentile(KernelClipPolicy):
    """AutoClip: the limit is a percentile of the norms so far, that of this step included.

    The percentile lies between its two neighbours as in ``numpy.percentile``. At the default only a tenth of the steps
    is not clipped at all, and what the update sees follows the smaller norms.

    Source: Seetharaman et al. 2020, "AutoClip: Adaptive gradient clipping for source separation networks" and
    github.com/pseeth/autoclip, which keeps all norms; here the oldest are forgotten. There is no warm-up: the first
    step's limit is its own norm. Steps that are skipped leave no norm, nor do norms of 0 and those that are not finite.

    Args:
        percentile: in [0, 100]. Default: 10.
        window: how many norms are kept, at least 1: 16 bytes each, per scope. Default: 10000.

    Raises:
        TypeError: an argument is no number, or ``window`` no int.
        ValueError: an argument is out of range.
    """

    percentile: float = 10.0
    window: int = 10000

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self._number("percentile") > 100:
            raise ValueError(
                f"ClipPercentile: percentile: expected a number in [0, 100], got {self.percentile!r}"
            )
        self._count("window", low=1)

    @property
    def for_kernels(self) -> _kernels.ClipPolicy:
        """Its name, fraction and window."""
        level = float(self.percentile) / 100
        return _kernels.ClipPolicy("percentile", level=level, window=self.window)

    def saved(self, row: list[float]) -> list[float]:
        """The place of the oldest norm, and the norms in the order of steps."""
        return _saved_norms(row)

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """With the norms sorted again."""
        row = _restored_norms(saved, self.window)
        if row is None:
            return None
        norms = sorted(saved[1:])
        return [*row, *norms, *[0.0] * (self.window - len(norms))]


@dataclass(frozen=True)
class SkipSpikes(KernelPolicy):
    r"""Skips a step whose norm is a spike: :math:`N > \mu + \text{sigma} \cdot s` over the last ``window`` norms.

    :math:`\mu` and :math:`s` are their mean and standard deviation (n - 1), without this step's norm. The norm is the
    global one, after unscaling and before clipping. The first window / 2 steps (at least 2) are never skipped.
    Skipped steps count in ``skipped_steps``; ``sg.GradScaler`` does not take them for an overflow.

    A spike's norm is remembered, too: after a lasting rise of the norm steps are taken again as soon as the window has
    seen it, and after a lone spike the bar is higher until it has left the window. Nothing else of a skipped step is.

    Source: the rule of OLMo-core's ``SkipStepOptimizer`` ("2 OLMo 2 Furious", 2025), there for the loss as well.

    Args:
        sigma: standard deviations above the mean, more than 0. Default: 6.
        window: how many norms are kept, at least 2. Default: 128.

    Raises:
        TypeError: ``sigma`` is no number, or ``window`` no int.
        ValueError: an argument is out of range.
    """

    sigma: float = 6.0
    window: int = 128

    def __post_init__(self) -> None:
        """Checks the numbers."""
        self._positive("sigma")
        self._count("window", low=2)

    @property
    def for_kernels(self) -> _kernels.SpikePolicy:
        """Its two numbers."""
        return _kernels.SpikePolicy(sigma=float(self.sigma), window=self.window)

    def saved(self, row: list[float]) -> list[float]:
        """The place of the oldest norm, and the norms in the order of steps."""
        return _saved_norms(row)

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """Returns the row that these numbers were saved from, or None where they do not fit."""
        return _restored_norms(saved, self.window)
