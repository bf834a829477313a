"""Policies that compare a norm with a moving average of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from steadygrad import _kernels
from steadygrad.policies.clip_policy import KernelClipPolicy
from steadygrad.policies.policy import LEARNT, Scope


def _restored(saved: Sequence[float], size: int) -> list[float] | None:
    if not saved:
        return [0.0] * size
    # The first saved number is the count of norms so far.
    fits = len(saved) == size - LEARNT and 0 < saved[0] < math.inf and saved[0] == int(saved[0])
    return [*[0.0] * LEARNT, *saved] if fits else None


@dataclass(frozen=True)
class ClipZScore(KernelClipPolicy):
    r"""Clips norms that are far above their moving average, and the more so the further they are (ZClip).

    With mean :math:`\mu`, variance :math:`\sigma^2` and :math:`z = (N - \mu) / (\sigma + 10^{-6})`, a norm with
    :math:`z > z_t` gets the limit

    .. math:: \text{limit} = \Bigl(\mu + z_t \sigma \frac{z_t}{z}\Bigr) \cdot \text{clip\_factor}

    Other norms have no limit, except that ``max_norm`` is the largest limit at all times. Afterwards mean and variance
    are updated with :math:`N'`, which is the limit of a clipped norm and else the norm itself:
    :math:`\mu \leftarrow \alpha\mu + (1-\alpha)N'` and
    :math:`\sigma^2 \leftarrow \alpha\sigma^2 + (1-\alpha)(N' - \mu)^2` with the new mean. During the warm-up only
    ``max_norm`` limits, and at its end mean and variance are those of the norms seen so far.

    Source: Kumar et al. 2025, "ZClip: Adaptive spike mitigation for LLM pre-training", and its code,
    github.com/bluorion-com/ZClip (mode ``zscore``, ``adaptive_scaling``). The defaults are those of the code, with one
    exception: the code also limits every norm to ``max_grad_norm=1.0``, which is ``ClipZScore(max_norm=1.0)`` here. If
    norms are always above 1, that cap alone decides, and the policy gives the same numbers as ``max_norm=1.0``. Skipped
    steps, norms of 0 and non-finite norms leave mean and variance unchanged.

    Args:
        z_threshold: The threshold :math:`z_t`, more than 0. Default: 2.5.
        alpha: The decay of the moving averages, in [0, 1). Default: 0.97.
        warmup: The number of warm-up steps, at least 1. Default: 25.
        max_norm: A hard limit in addition, also during the warm-up, at least 0; None for no such limit. Default: None.
        clip_factor: A factor of the limit, more than 0; less than 1 clips harder. Default: 1.0.

    Raises:
        TypeError: An argument is not a number, or ``warmup`` is not an int.
        ValueError: An argument is out of range.
    """

    z_threshold: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float | None = None
    clip_factor: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        self._positive("z_threshold")
        self._fraction("alpha")
        self._count("warmup", low=1)
        self._cap("max_norm")
        self._positive("clip_factor")

    @property
    def for_kernels(self) -> _kernels.ClipPolicy:
        """Returns the policy's name, cap, threshold, decay, factor and warm-up."""
        return _kernels.ClipPolicy(
            "zscore",
            max_norm=self._cap("max_norm"),
            level=float(self.z_threshold),
            decay=float(self.alpha),
            factor=float(self.clip_factor),
            warmup=self.warmup,
        )

    def saved(self, row: list[float]) -> list[float]:
        """Returns count, mean and variance."""
        return row[LEARNT:] if row[LEARNT] else []

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """Returns the row that these numbers were saved from, or None if they do not fit."""
        return _restored(saved, self.row_size)


@dataclass(frozen=True)
class ClipRelative(KernelClipPolicy):
    r"""Clips each parameter's norm relative to the moving average of its own clipped norms (AdaGC).

    After the warm-up, for each scope (by default each parameter):

    .. math:: c = \min\Bigl(1, \frac{\text{relative} \cdot \gamma}{N + 10^{-6}}\Bigr), \quad
        \gamma \leftarrow \beta\gamma + (1 - \beta) c N

    During the warm-up all gradients are clipped by their total norm to ``max_norm``, and :math:`\gamma` is the smallest
    clipped norm so far. **So** ``max_norm`` **decides what is learnt:** if norms are far above 1, the averages start
    from norms that ``max_norm`` has shrunk. The limits after the warm-up then stay near those, because an average of
    clipped norms rises by at most :math:`(1 - \beta)(\text{relative} - 1)` of itself in a step, by default a
    thousandth. For limits of the size of the norms themselves, use ``max_norm=None``, or a number that the norms of a
    healthy training do not reach.

    Source: Wang et al. 2025, "AdaGC: Improving training stability for large language model pretraining",
    arXiv 2502.11034 (lambda_rel, beta, lambda_abs). There is one difference: norms of 0 do not enter the average and do
    not count as warm-up steps, since an average of 0 would clip the parameter to zero for ever. Non-finite norms and
    norms of skipped steps do not enter it either.

    Args:
        relative: The paper's lambda_rel, more than 0. Default: 1.05.
        beta: The decay of the moving average, in [0, 1). Default: 0.98.
        warmup: The number of warm-up steps, at least 1. Default: 100.
        max_norm: The paper's lambda_abs, the limit of the total norm during the warm-up, at least 0; None for no limit.
            Default: 1.0, as published.

    Raises:
        TypeError: An argument is not a number, or ``warmup`` is not an int.
        ValueError: An argument is out of range.
    """

    default_scope: ClassVar[Scope] = "tensor"

    relative: float = 1.05
    beta: float = 0.98
    warmup: int = 100
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        self._positive("relative")
        self._fraction("beta")
        self._count("warmup", low=1)
        self._cap("max_norm")

    @property
    def for_kernels(self) -> _kernels.ClipPolicy:
        """Returns the policy's name, cap, ratio, decay and warm-up."""
        return _kernels.ClipPolicy(
            "relative",
            max_norm=self._cap("max_norm"),
            level=float(self.relative),
            decay=float(self.beta),
            warmup=self.warmup,
        )

    def saved(self, row: list[float]) -> list[float]:
        """Returns count and average."""
        return row[LEARNT:] if row[LEARNT] else []

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """Returns the row that these numbers were saved from, or None if they do not fit."""
        return _restored(saved, self.row_size)
