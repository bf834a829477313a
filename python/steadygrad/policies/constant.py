"""Policies that learn nothing from the norms."""

from __future__ import annotations

from dataclasses import dataclass

from steadygrad import _kernels
from steadygrad.policies.clip_policy import KernelClipPolicy


@dataclass(frozen=True)
class ClipNorm(KernelClipPolicy):
    r"""A constant limit: :math:`c = \min(1, \text{max\_norm} / (N + 10^{-6}))`.

    ``clip=ClipNorm(1.0)`` is ``max_norm=1.0``. Source: Pascanu et al. 2013, "On the difficulty of training recurrent
    neural networks"; the coefficient is that of ``torch.nn.utils.clip_grad_norm_``.

    Args:
        max_norm: the limit, at least 0; infinity never clips.

    Raises:
        TypeError: ``max_norm`` is no number.
        ValueError: ``max_norm`` is negative or NaN.
    """

    max_norm: float

    def __post_init__(self) -> None:
        """Checks the number."""
        self._number("max_norm", finite=False)


@dataclass(frozen=True)
class Damp(KernelClipPolicy):
    r"""Shrinks large norms instead of cutting them: :math:`c = (\text{max\_norm} / N)^\text{power}` for N > max_norm.

    The clipped norm is :math:`\text{max\_norm}^\text{power} N^{1 - \text{power}}`, so that larger gradients still make
    larger steps; with ``power=1`` it is the constant limit. The simplest form of power-law shaping; compare SPAMP,
    arXiv 2510.01578, which does it layer by layer with thresholds that it estimates.

    Args:
        max_norm: from which norm on, at least 0.
        power: more than 0, at most 1. Default: 0.5.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.
    """

    max_norm: float
    power: float = 0.5

    def __post_init__(self) -> None:
        """Checks the numbers."""
        self._number("max_norm")
        if not 0 < self._number("power") <= 1:
            raise ValueError(f"Damp: power: expected a number > 0 and <= 1, got {self.power!r}")

    @property
    def for_kernels(self) -> _kernels.ClipPolicy:
        """Its name, limit and power."""
        return _kernels.ClipPolicy("damp", max_norm=float(self.max_norm), level=float(self.power))
