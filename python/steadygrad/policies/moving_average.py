"""Policies that keep moving averages of the norms."""

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
    # The first number is how many norms there were.
    fits = len(saved) == size - LEARNT and 0 < saved[0] < math.inf and saved[0] == int(saved[0])
    return [*[0.0] * LEARNT, *saved] if fits else None


@dataclass(frozen=True)
class ClipZScore(KernelClipPolicy):
    r"""ZClip: norms that deviate too much from their moving average are clipped, the more the more they deviate.

    With mean :math:`\mu`, variance :math:`\sigma^2` and :math:`z = (N - \mu) / (\sigma + 10^{-6})`, where
    :math:`z > z_t`:

    .. math:: \text{limit} = \Bigl(\mu + z_t \sigma \frac{z_t}{z}\Bigr) \cdot \text{clip\_factor}

    and else none; it is at most ``max_norm``. Then, with :math:`N'` such a norm's limit, else the norm itself,
    :math:`\mu \leftarrow \alpha\mu + (1-\alpha)N'` and
    :math:`\sigma^2 \leftarrow \alpha\sigma^2 + (1-\alpha)(N' - \mu)^2` with the new mean. During the warm-up nothing
    but ``max_norm`` limits; mean and variance start as those of its norms.

    Source: Kumar et al. 2025, "ZClip: Adaptive spike mitigation for LLM pre-training", and its code,
    github.com/bluorion-com/ZClip (mode ``zscore``, ``adaptive_scaling``), whose defaults these are, but for one: the
    code also limits every norm to ``max_grad_norm=1.0``, which is ``ClipZScore(max_norm=1.0)`` here. Where norms are
    above 1 all of the time such a cap decides alone, and the policy is ``max_norm=1.0`` number by number. Steps that
    are skipped, norms of 0 and those that are not finite leave mean and variance as they are.

    Args:
        z_threshold: :math:`z_t`, more than 0. Default: 2.5.
        alpha: in [0, 1). Default: 0.97.
        warmup: steps, at least 1. Default: 25.
        max_norm: hard limit besides, in the warm-up too, at least 0, or None for none. Default: None.
        clip_factor: more than 0; less than 1 clips harder. Default: 1.0.

    Raises:
        TypeError: an argument is no number, or ``warmup`` no int.
        ValueError: an argument is out of range.
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
        """Its name, cap, threshold, decay, factor and warm-up."""
        return _kernels.ClipPolicy(
            "zscore",
            max_norm=self._cap("max_norm"),
            level=float(self.z_threshold),
            decay=float(self.alpha),
            factor=float(self.clip_factor),
            warmup=self.warmup,
        )

    def saved(self, row: list[float]) -> list[float]:
        """Count, mean and variance."""
        return row[LEARNT:] if row[LEARNT] else []

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """Returns the row that these numbers were saved from, or None where they do not fit."""
        return _restored(saved, self.row_size)


@dataclass(frozen=True)
class ClipRelative(KernelClipPolicy):
    r"""AdaGC: each parameter's norm is limited relative to the moving average of its own clipped norms.

    After the warm-up, per scope (by default each parameter):

    .. math:: c = \min\Bigl(1, \frac{\text{relative} \cdot \gamma}{N + 10^{-6}}\Bigr), \quad
        \gamma \leftarrow \beta\gamma + (1 - \beta) c N

    In the warm-up all gradients are clipped by their total norm to ``max_norm``, and :math:`\gamma` is the smallest
    clipped norm. **So** ``max_norm`` **decides what is learnt:** where norms are far above 1, the averages start from
    norms that it has shrunk, and the limits after the warm-up stay near those, as an average of clipped norms rises by
    :math:`(1 - \beta)(\text{relative} - 1)` a step at most, a thousandth by default. For limits of the size of
    the norms themselves, take ``max_norm=None``, or a number that the norms of a healthy training do not reach.

    Source: Wang et al. 2025, "AdaGC: Improving training stability for large language model pretraining",
    arXiv 2502.11034 (lambda_rel, beta, lambda_abs). Where the average would become 0, which clips a parameter to zero
    for ever, we differ: norms of 0 do not enter it and do not count as steps of the warm-up. Nor do those that are not
    finite, and those of skipped steps.

    Args:
        relative: lambda_rel, more than 0. Default: 1.05.
        beta: in [0, 1). Default: 0.98.
        warmup: steps, at least 1. Default: 100.
        max_norm: lambda_abs, the limit of the total norm in the warm-up, at least 0, or None for none. Default: 1.0,
            as published.

    Raises:
        TypeError: an argument is no number, or ``warmup`` no int.
        ValueError: an argument is out of range.
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
        """Its name, cap, ratio, decay and warm-up."""
        return _kernels.ClipPolicy(
            "relative",
            max_norm=self._cap("max_norm"),
            level=float(self.relative),
            decay=float(self.beta),
            warmup=self.warmup,
        )

    def saved(self, row: list[float]) -> list[float]:
        """Count and average."""
        return row[LEARNT:] if row[LEARNT] else []

    def restored(self, saved: Sequence[float]) -> list[float] | None:
        """Returns the row that these numbers were saved from, or None where they do not fit."""
        return _restored(saved, self.row_size)
