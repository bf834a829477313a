"""Norms of one array and of a list of arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def tensor_norm(array: ArrayLike, norm_type: float = 2.0) -> float:
    """Returns the vector p-norm of an array of any shape.

    Formula (``torch.linalg.vector_norm``), with ``p = norm_type``::

        p = inf      max |g|
        p = -inf     min |g|
        p = 0        number of non-zero elements
        otherwise    (sum |g|^p)^(1/p)

    The elements are divided by the largest magnitude (the smallest, for ``p < 0``) before the power, so that the sum
    neither overflows nor underflows. If the root of the sum does, for p near 0, the magnitude is multiplied twice by
    the square root of that root. An array without elements has norm 0.

    Non-finite elements decide the result for every ``p``: NaN if any element is NaN, else inf if
    any is infinite. torch agrees for ``p > 0``; for ``p <= 0`` it can return a finite norm.

    Raises:
        ValueError: ``norm_type`` is NaN.
    """
    p = float(norm_type)
    if math.isnan(p):
        raise ValueError("tensor_norm: norm_type must be a number, got nan")
    magnitude = np.abs(np.asarray(array, dtype=np.float64))
    if magnitude.size == 0:
        return 0.0
    if np.isnan(magnitude).any():
        return math.nan
    if np.isinf(magnitude).any():
        return math.inf
    if p == 0:
        return float(np.count_nonzero(magnitude))
    scale = float(magnitude.max() if p > 0 else magnitude.min())
    # If the scale is 0, all elements are 0 (p > 0), or the power of one of them is infinite (p < 0).
    if math.isinf(p) or scale == 0:
        return scale
    with np.errstate(over="ignore", under="ignore"):
        powers = np.sum((magnitude / scale) ** p)
        root = powers ** (1.0 / p)
        if root > 0 and np.isfinite(root):
            return float(scale * root)
        root = powers ** (0.5 / p)
        return float(scale * root * root)


def total_norm(arrays: Iterable[ArrayLike], norm_type: float = 2.0) -> float:
    """Returns the norm of all arrays as if they were concatenated into a single vector.

    Formula: ``tensor_norm(concatenate(arrays), norm_type)``; an empty list has norm 0. Source:
    ``torch.nn.utils.get_total_norm``, which differs only for ``norm_type=0``: it counts the tensors that have a
    non-zero element.

    Raises:
        ValueError: ``norm_type`` is NaN.
    """
    vectors = [np.ravel(np.asarray(array, dtype=np.float64)) for array in arrays]
    return tensor_norm(np.concatenate(vectors) if vectors else [], norm_type)
