"""Policies that compare a norm with a window of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steadygrad import _kernels
from steadygrad.policies.clip_policy import KernelClipPolicy
from steadygrad.policies.policy import LEARNT, KernelPolicy

# Columns of a policy's row: the number of norms, the place of the oldest one, and the place of the first one.
_COUNT, _OLDEST, _BEFORE_NORMS = (
    _kernels.POLICY_ROW[name] for name in ("count", "oldest", "norms")
)


def _restored_norms(saved: Sequence[float], window: int) -> list[float] | None:
    if not saved:
        return [0.0] * (_BEFORE_NORMS + window)
    oldest, *norms = saved
    count = len(norms)
    # In a full ring the oldest norm may be at any place. Before that, the next place is the first free one.
    fits = 0 <= oldest < window and oldest == int(oldest) and count <= window
    if not fits or (count < window and oldest != count):
        return None
    return [*[0.0] * LEARNT, float(count), float(oldest), *norms, *[0.0] * (window - count)]


def _saved_norms(row: list[float]) -> list[float]:
    count = int(row[_COUNT])
    return [row[_OLDEST], *row[_BEFORE_NORMS : _BEFORE_NORMS + count]] if count else []


@dataclass(frozen=True)
class ClipPercentile(KernelClipPolicy):
    """Clips to a percentile of the norms so far, including this step's norm (AutoClip).

    The percentile is interpolated between its two neighbours, as in ``numpy.percentile``. At the default only one step
    in ten is not clipped at all, so the sizes of the updates follow the smaller norms.

    Source: Seetharaman et al. 2020, "AutoClip: Adaptive gradient clipping for source separation networks" and
    github.com/pseeth/autoclip, which keeps all norms; here a window is kept. There is no warm-up: the first step's
    limit is its own norm. Norms of skipped steps, norms of 0 and non-finite norms do not enter the window.

    Args:
        percentile: The percentile, in [0, 100]. Default: 10.
        window: The number of norms kept, at least 1; each takes 16 bytes per scope. Default: 10000.

    Raises:
        TypeError: An argument is not a number, or ``window`` is not an int.
        ValueError: An argument is out of range.
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
        """Returns the policy's name, fraction and window."""
        level = float(self.percentile) / 100
        return _kernels.ClipPolicy("percentile", level=level, window=self.window)

    def saved(self, row: list[float]) -> list[float]:
        """Returns the place of the oldest norm, followed by the norms in the order of the ring."""
        return _saved_norms(row)

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """Returns the row that these numbers were saved from, with sorted norms, or None if they do not fit."""
        row = _restored_norms(saved, self.window)
        if row is None:
            return None
        norms = sorted(saved[1:])
        return [*row, *norms, *[0.0] * (self.window - len(norms))]


@dataclass(frozen=True)
class SkipSpikes(KernelPolicy):
    r"""Skips a step whose norm is a spike: :math:`N > \mu + \text{sigma} \cdot s` over the last ``window`` norms.

    Here :math:`\mu` and :math:`s` are the mean and the standard deviation (n - 1) of those norms, without this step's.
    The norm is the total norm, after unscaling and before clipping. The first window / 2 steps (at least 2) are never
    skipped. Skipped steps count in ``skipped_steps``. ``sg.GradScaler`` does not count them as an overflow.

    The norm of a skipped step enters the window, too, but nothing else of it is kept. So after a lasting rise of the
    norm, steps are taken again once the window has seen enough of it, and after a single spike the threshold is higher
    until the spike has left the window.

    Source: the rule of OLMo-core's ``SkipStepOptimizer`` ("2 OLMo 2 Furious", 2025), which also applies it to the loss.

    Args:
        sigma: The number of standard deviations above the mean, more than 0. Default: 6.
        window: The number of norms kept, at least 2. Default: 128.

    Raises:
        TypeError: ``sigma`` is not a number, or ``window`` is not an int.
        ValueError: An argument is out of range.
    """

    sigma: float = 6.0
    window: int = 128

    def __post_init__(self) -> None:
        """Checks the numbers."""
        self._positive("sigma")
        self._count("window", low=2)

    @property
    def for_kernels(self) -> _kernels.SpikePolicy:
        """Returns sigma and the window."""
        return _kernels.SpikePolicy(sigma=float(self.sigma), window=self.window)

    def saved(self, row: list[float]) -> list[float]:
        """Returns the place of the oldest norm, followed by the norms in the order of the ring."""
        return _saved_norms(row)

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """Returns the row that these numbers were saved from, or None if they do not fit."""
        return _restored_norms(saved, self.window)
