"""Batch normalization of arrays of shape (N, C, ...): statistics, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .norm import Array

Activation = Literal["relu", "relu6"]

# By its activation, what an output may be at most; None where it may be anything, also less than 0.
CEILINGS: dict[Activation | None, float | None] = {None: None, "relu": np.inf, "relu6": 6.0}


@dataclass(frozen=True)
class Statistics:
    """The mean and biased variance of each channel, shape (C), and the number of elements of a channel."""

    mean: Array
    var: Array
    count: int


class Gradients(NamedTuple):
    """The gradients that the backward pass returns, shape (N, C, ...) for input and residual, else (C)."""

    input: Array
    residual: Array
    weight: Array
    bias: Array


def channel_statistics(input: ArrayLike) -> Statistics:
    """Returns the statistics of a batch of shape (N, C, ...).

    Formula, over the ``n`` elements of a channel (Ioffe and Szegedy 2015, algorithm 1)::

        mean = sum(x) / n
        var  = sum((x - mean)^2) / n

    The batch is read twice, so that nothing cancels; the second pass corrects the rounding of the first one's mean
    (Chan, Golub and LeVeque 1983, equation 1.7). An empty batch gives zeros. A channel with a non-finite element has
    the variance NaN.
    """
    x = np.asarray(input, dtype=np.float64)
    channels, axes = x.shape[1], _all_but_channels(x)
    count = x.size // channels if channels else 0
    if count == 0:
        return Statistics(np.zeros(channels), np.zeros(channels), 0)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = x.mean(axis=axes)
        deviation = x - _along_channels(mean, x)
        left = deviation.mean(axis=axes)
        var = np.square(deviation).mean(axis=axes) - np.square(left)
        mean = np.where(np.isfinite(left), mean + left, mean)
    return Statistics(mean, np.maximum(var, 0.0), count)


def combine_statistics(parts: Iterable[Statistics]) -> Statistics:
    """Returns the statistics of all parts of a batch taken together.

    Formula for two parts, ``n = n_a + n_b`` and ``d = mean_b - mean_a`` (Chan, Golub and LeVeque 1979,
    "Updating formulae and a pairwise algorithm for computing sample variances")::

        mean    = mean_a + d * n_b / n
        n * var = n_a * var_a + n_b * var_b + d^2 * n_a * n_b / n

    Parts without elements change nothing; their means and variances are not read.

    Raises:
        ValueError: There is no part.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("combine_statistics: parts must hold at least one, got none")
    channels = np.shape(parts[0].mean)
    mean, squares, count = np.zeros(channels), np.zeros(channels), 0
    for part in parts:
        if part.count == 0:
            continue
        total = count + part.count
        with np.errstate(invalid="ignore", over="ignore"):
            delta = np.asarray(part.mean) - mean
            mean = mean + delta * (part.count / total)
            between = np.square(delta) * (count * part.count / total) if count else 0.0
            squares = squares + np.asarray(part.var) * part.count + between
        count = total
    return Statistics(mean, squares / max(count, 1), count)


def update_running_statistics(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    statistics: Statistics,
    momentum: float | None = 0.1,
    num_batches_tracked: int = 1,
) -> tuple[Array, Array]:
    """Returns running mean and running variance after a batch with these statistics.

    Formula (``torch.nn.BatchNorm2d``); the running variance is the unbiased one::

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var  = (1 - momentum) * running_var  + momentum * var * n / (n - 1)

    A channel whose new mean or variance would not be finite keeps its old ones. In torch they would stay infinite or
    NaN for ever. The batch is counted all the same.

    One value per channel has no unbiased variance: torch refuses it, and here its variance counts as 0.

    Args:
        running_mean: Shape (C).
        running_var: Shape (C).
        statistics: The statistics of the batch.
        momentum: The weight of the new value. None gives the cumulative average, whose factor is
            ``1 / num_batches_tracked``.
        num_batches_tracked: The number of batches, including this one.
    """
    factor = 1 / num_batches_tracked if momentum is None else momentum
    unbiased = statistics.var * (statistics.count / max(statistics.count - 1, 1))
    old_mean = np.asarray(running_mean, dtype=np.float64)
    old_var = np.asarray(running_var, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        new_mean = (1 - factor) * old_mean + factor * statistics.mean
        new_var = (1 - factor) * old_var + factor * unbiased
    finite = np.isfinite(new_mean) & np.isfinite(new_var)
    return np.where(finite, new_mean, old_mean), np.where(finite, new_var, old_var)


def batch_norm(
    input: ArrayLike,
    statistics: Statistics,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
) -> Array:
    """Returns the normalised batch.

    Formula (Ioffe and Szegedy 2015; ``torch.nn.functional.batch_norm``), followed by a residual and an activation as in
    a residual network (He et al. 2015)::

        y = (x - mean) / sqrt(var + eps) * weight + bias
        y = y + residual
        y = max(y, 0)           activation "relu"; NaN stays NaN
        y = min(max(y, 0), 6)   activation "relu6" (Krizhevsky 2010); NaN stays NaN

    Args:
        input: Shape (N, C, ...).
        statistics: In training :func:`channel_statistics` of the input, or the statistics of all
            processes together; in inference the running mean and variance.
        weight: Shape (C); None counts as ones.
        bias: Shape (C); None counts as zeros.
        eps: Added to the variance.
        residual: Shape of the input, added before the activation; None adds nothing.
        activation: None, "relu" or "relu6".

    Raises:
        ValueError: The activation is unknown.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        y = _normalized(input, statistics, eps)
        if weight is not None:
            y = y * _along_channels(weight, y)
        if bias is not None:
            y = y + _along_channels(bias, y)
        if residual is not None:
            y = y + np.asarray(residual, dtype=np.float64)
        ceiling = _ceiling(activation)
        return y if ceiling is None else np.where(y <= 0, 0.0, np.where(y >= ceiling, ceiling, y))


def batch_norm_backward(
    grad_output: ArrayLike,
    input: ArrayLike,
    statistics: Statistics,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    constant_statistics: bool = False,
) -> Gradients:
    """Returns the gradients of :func:`batch_norm`, given its arguments.

    Formula, with ``x_hat = (x - mean) / sqrt(var + eps)`` and means over the ``n`` elements of a
    channel (Ioffe and Szegedy 2015, section 3)::

        g = grad_output * (y > 0)                    with ReLU
        g = grad_output * (0 < y < 6)                with ReLU6; else grad_output
        grad_residual = g
        grad_bias     = sum(g)
        grad_weight   = sum(g * x_hat)
        grad_input    = weight / sqrt(var + eps) * (g - mean(g) - x_hat * mean(g * x_hat))

    The last two terms are the input's effect on the statistics. With ``constant_statistics``, as in inference, they are
    absent. A NaN in ``y`` lets its gradient through, as in torch.

    Raises:
        ValueError: The activation is unknown.
    """
    gradient = np.asarray(grad_output, dtype=np.float64)
    axes = _all_but_channels(gradient)
    with np.errstate(invalid="ignore", over="ignore"):
        ceiling = _ceiling(activation)
        if ceiling is not None:
            y = batch_norm(input, statistics, weight, bias, eps, residual)
            is_cut = (y <= 0) | ((y >= ceiling) & (ceiling < np.inf))
            gradient = np.where(is_cut, 0.0, gradient)
        x_hat = _normalized(input, statistics, eps)
        grad_bias = gradient.sum(axis=axes)
        grad_weight = (gradient * x_hat).sum(axis=axes)
        grad_input = gradient
        if not constant_statistics:
            count = max(statistics.count, 1)
            grad_input = grad_input - _along_channels(grad_bias / count, gradient)
            grad_input = grad_input - x_hat * _along_channels(grad_weight / count, gradient)
        scale = 1 / np.sqrt(statistics.var + eps)
        if weight is not None:
            scale = scale * np.asarray(weight, dtype=np.float64)
        return Gradients(
            grad_input * _along_channels(scale, gradient), gradient, grad_weight, grad_bias
        )


def _normalized(input: ArrayLike, statistics: Statistics, eps: float) -> Array:
    x = np.asarray(input, dtype=np.float64)
    variance = np.asarray(statistics.var, dtype=np.float64) + eps
    deviation: Array = x - _along_channels(statistics.mean, x)
    return deviation / _along_channels(np.sqrt(variance), x)


def _ceiling(activation: Activation | None) -> float | None:
    if activation not in CEILINGS:
        raise ValueError(
            f"batch_norm: activation must be None, 'relu' or 'relu6', got {activation!r}"
        )
    return CEILINGS[activation]


def _all_but_channels(array: Array) -> tuple[int, ...]:
    return tuple(axis for axis in range(array.ndim) if axis != 1)


def _along_channels(vector: ArrayLike, array: Array) -> Array:
    """Reshapes a vector of shape (C) so that it broadcasts along the channels of ``array``."""
    shape = [1] * array.ndim
    shape[1] = array.shape[1]
    return np.asarray(vector, dtype=np.float64).reshape(shape)
