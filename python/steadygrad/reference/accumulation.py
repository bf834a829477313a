"""Gradient accumulation over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .norm import Array


def accumulated_mean(
    grads: Sequence[ArrayLike], weights: Sequence[float] | None = None, decay: float = 1.0
) -> Array:
    """Returns ``sum_k(decay**(n-k) * g_k) / sum_k(decay**(n-k) * w_k)`` for k = 1 ... n.

    A weight is what its micro-batch adds to the divisor; the gradient is not multiplied by it. Source: Ott et al. 2018,
    "Scaling neural machine translation", for weights that count tokens; the decay is that of an exponential moving
    average.

    Args:
        grads: An array for each micro-batch, the oldest first, all of the same shape.
        weights: A weight for each micro-batch, at least 0 and not all 0. Default: all 1.
        decay: More than 0, at most 1. Default: 1.

    Raises:
        ValueError: A weight is negative or not finite, all weights are 0, there are not as many weights as gradients,
            or the decay is out of range.
    """
    weights = [1.0] * len(grads) if weights is None else list(weights)
    if len(weights) != len(grads):
        raise ValueError(
            f"accumulated_mean: expected {len(grads)} weights, one for each gradient, got {len(weights)}"
        )
    if not all(0 <= weight < np.inf for weight in weights):
        raise ValueError(f"accumulated_mean: weights must be finite and >= 0, got {weights}")
    if not 0 < decay <= 1:
        raise ValueError(f"accumulated_mean: decay must be > 0 and <= 1, got {decay}")
    total: Array = np.zeros(np.shape(grads[0]) if grads else (), dtype=np.float64)
    divisor = 0.0
    with np.errstate(invalid="ignore"):  # inf - inf
        for grad, weight in zip(grads, weights, strict=True):
            total = decay * total + np.asarray(grad, dtype=np.float64)
            divisor = decay * divisor + weight
    if divisor == 0:
        raise ValueError("accumulated_mean: weights must not all be 0")
    return total / divisor
