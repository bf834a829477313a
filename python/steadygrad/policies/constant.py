"""Clip policies without state: a constant limit, and one that shrinks large norms."""

from __future__ import annotations

from dataclasses import dataclass

from steadygrad import _kernels
from steadygrad.policies.clip_policy import KernelClipPolicy


@dataclass(frozen=True)
class ClipNorm(KernelClipPolicy):
    r"""Clips the norm to a constant limit: :math:`c = \min(1, \text{max\_norm} / (N + 10^{-6}))`.

    ``clip=ClipNorm(1.0)`` is the same as ``max_norm=1.0``. Source: Pascanu et al. 2013, "On the difficulty of training
    recurrent neural networks"; the coefficient is that of ``torch.nn.utils.clip_grad_norm_``.

    Args:
        max_norm: The limit, at least 0; infinity never clips.

    Raises:
        TypeError: ``max_norm`` is not a number.
        ValueError: ``max_norm`` is negative or NaN.
    """

    max_norm: float

    def __post_init__(self) -> None:
        """Checks the number."""
        self._number("max_norm", finite=False)


@dataclass(frozen=True)
class Damp(KernelClipPolicy):
    r"""Shrinks large norms instead of cutting them: :math:`c = (\text{max\_norm} / N)^\text{power}` for N > max_norm.

    The clipped norm is :math:`\text{max\_norm}^\text{power} N^{1 - \text{power}}`, so larger gradients still make
    larger steps; ``power=1`` gives the constant limit. This is the simplest form of power-law shaping. Compare SPAMP,
    arXiv 2510.01578, which shapes layer by layer, with thresholds that it estimates.

    Args:
        max_norm: The norm above which gradients are shrunk, at least 0.
        power: The exponent, more than 0 and at most 1. Default: 0.5.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.
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
        """Returns the policy's name, limit and power."""
        return _kernels.ClipPolicy("damp", max_norm=float(self.max_norm), level=float(self.power))
