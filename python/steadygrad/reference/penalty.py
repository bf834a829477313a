"""L1 and L2 penalties: value, gradient and proximal operator."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from .norm import Array


def sign(param: ArrayLike) -> Array:
    """Returns -1, 0 or 1 for each element: 0 for zero and, as ``torch.sign`` does, for NaN."""
    param = np.asarray(param, dtype=np.float64)
    return (param > 0).astype(np.float64) - (param < 0).astype(np.float64)


def penalty_gradient(param: ArrayLike, l1: float, l2: float) -> Array:
    """Returns the gradient of the penalty, ``l1 * sign(p) + l2 * p``, with ``sign(0) = 0``.

    It equals ``torch.autograd``'s gradient of :func:`penalty_value`. With ``l2 = 0`` the second term is left out, so
    that an infinite parameter does not give NaN.
    """
    gradient = l1 * sign(param)
    return gradient + l2 * np.asarray(param, dtype=np.float64) if l2 != 0 else gradient


def penalty_value(params: Iterable[ArrayLike], l1: float, l2: float) -> float:
    """Returns the penalty, ``l1 * sum |p| + l2 / 2 * sum p^2`` over all elements of all arrays."""
    arrays = [np.asarray(param, dtype=np.float64) for param in params]
    sum_magnitude = sum(float(np.abs(array).sum()) for array in arrays)
    sum_square = sum(float(np.square(array).sum()) for array in arrays)
    return l1 * sum_magnitude + l2 / 2 * sum_square


def soft_threshold(param: ArrayLike, amount: float) -> Array:
    """Returns ``sign(p) * max(|p| - amount, 0)``, which makes small elements exactly zero.

    This is the proximal operator of ``amount * |p|``. Source: ``torch.nn.functional.softshrink``; Parikh
    and Boyd 2014, "Proximal Algorithms", section 6.5.2.
    """
    return sign(param) * np.maximum(np.abs(np.asarray(param, dtype=np.float64)) - amount, 0.0)
