"""Clipping of gradients by norm and by value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .norm import Array, total_norm


def clip_coefficient(limit: float, norm: float) -> float:
    """Returns ``min(1, limit / (norm + 1e-6))``, the factor that brings ``norm`` under ``limit``.

    A NaN norm gives NaN and an infinite norm gives 0, as in torch. An infinite limit never clips, while torch's
    ``inf / inf`` makes every gradient NaN. Source: ``torch.nn.utils.clip_grads_with_norm_``.
    """
    if limit == math.inf:
        return 1.0
    coefficient = limit / (norm + 1e-6)
    # The comparison keeps NaN: min(1.0, nan) would return 1.0.
    return 1.0 if coefficient > 1.0 else coefficient


def clip_grad_norm(
    grads: Sequence[ArrayLike], max_norm: float, norm_type: float = 2.0
) -> tuple[list[Array], float]:
    """Returns the gradients scaled to a total norm of at most ``max_norm``, and the norm before.

    Formula: ``g * min(1, max_norm / (N + 1e-6))`` with ``N = total_norm(grads, norm_type)``.
    Source: ``torch.nn.utils.clip_grad_norm_``; Pascanu et al. 2013, "On the difficulty of training
    recurrent neural networks", algorithm 1.

    Raises:
        ValueError: ``norm_type`` is NaN.
    """
    norm = total_norm(grads, norm_type)
    coefficient = clip_coefficient(max_norm, norm)
    with np.errstate(invalid="ignore"):  # 0 * inf = nan, as in torch
        return [np.asarray(grad, dtype=np.float64) * coefficient for grad in grads], norm


def clip_grad_value(grads: Sequence[ArrayLike], clip_value: float) -> list[Array]:
    """Returns the gradients with each element clamped to ``[-clip_value, clip_value]``.

    NaN elements stay NaN. Source: ``torch.nn.utils.clip_grad_value_``.
    """
    return [np.clip(np.asarray(grad, dtype=np.float64), -clip_value, clip_value) for grad in grads]
