"""Clip policies: a limit, or a coefficient, from the norms that a scope has had so far.

Each class except ``ClipAdaptive`` is a small object that is given the norms one after the other: ``coefficient(norm)``
returns the factor of the step's gradients and learns from the norm. A norm of 0 or a non-finite norm teaches nothing.
For a skipped step the object is not called.
"""

from __future__ import annotations

import math

import numpy as np

from .clip import clip_coefficient
from .norm import Array, tensor_norm


def _teaches(norm: float) -> bool:
    return norm > 0 and math.isfinite(norm)


class ClipPercentile:
    """Clips to the p-th percentile of the last ``window`` norms, including this step's norm.

    Source: Seetharaman et al. 2020, "AutoClip: Adaptive gradient clipping for source separation networks", section 2,
    with all norms as the window.

    Raises:
        ValueError: ``percentile`` is not in [0, 100], or ``window`` is less than 1.
    """

    def __init__(self, percentile: float = 10.0, window: int = 10000) -> None:
        if not 0 <= percentile <= 100 or window < 1:
            raise ValueError(
                f"ClipPercentile: expected a percentile in [0, 100] and a window >= 1, got {percentile}, {window}"
            )
        self.percentile, self.window = percentile, window
        self.norms: list[float] = []

    def coefficient(self, norm: float) -> float:
        """Returns the factor for a step with this norm."""
        if norm == 0:
            return 1.0
        if _teaches(norm):
            self.norms = [*self.norms, norm][-self.window :]
        limit = float(np.percentile(self.norms, self.percentile)) if self.norms else math.inf
        return clip_coefficient(limit, norm)


class ClipZScore:
    """Clips norms whose z-score, by moving averages, is above a threshold; the higher the score, the harder the clip.

    With ``z = (N - mean) / (std + 1e-6)`` above ``z_threshold``, the limit is
    ``(mean + z_threshold * std / (z / z_threshold)) * clip_factor``. It is never more than ``max_norm``. The averages
    are updated with the limit of such a norm, and with any other norm itself. They start as the mean and the variance
    of the first ``warmup`` norms, which only ``max_norm`` limits.

    Source: Kumar et al. 2025, "ZClip: Adaptive spike mitigation for LLM pre-training", and its code,
    github.com/bluorion-com/ZClip, where ``max_norm`` is 1.0.

    Raises:
        ValueError: ``z_threshold`` is not positive, ``alpha`` is not in [0, 1), or ``warmup`` is less than 1.
    """

    def __init__(
        self,
        z_threshold: float = 2.5,
        alpha: float = 0.97,
        warmup: int = 25,
        max_norm: float | None = None,
        clip_factor: float = 1.0,
    ) -> None:
        if not z_threshold > 0 or not 0 <= alpha < 1 or warmup < 1:
            raise ValueError(
                "ClipZScore: expected z_threshold > 0, alpha in [0, 1) and warmup >= 1, "
                f"got {z_threshold}, {alpha}, {warmup}"
            )
        self.z_threshold, self.alpha, self.warmup = z_threshold, alpha, warmup
        self.max_norm = math.inf if max_norm is None else max_norm
        self.clip_factor = clip_factor
        self.norms: list[float] = []
        self.mean = self.variance = 0.0

    def coefficient(self, norm: float) -> float:
        """Returns the factor for a step with this norm."""
        if norm == 0:
            return 1.0
        if len(self.norms) < self.warmup:
            if _teaches(norm):
                self.norms.append(norm)
                self.mean, self.variance = float(np.mean(self.norms)), float(np.var(self.norms))
            return clip_coefficient(self.max_norm, norm)
        std = math.sqrt(self.variance)
        z = (norm - self.mean) / (std + 1e-6)
        limit, seen = math.inf, norm
        if z > self.z_threshold:
            spread = self.z_threshold * std / (z / self.z_threshold)
            seen = limit = (self.mean + spread) * self.clip_factor
        if _teaches(norm):
            self.mean = self.alpha * self.mean + (1 - self.alpha) * seen
            deviation = (seen - self.mean) ** 2
            self.variance = self.alpha * self.variance + (1 - self.alpha) * deviation
        return clip_coefficient(min(limit, self.max_norm), norm)


class ClipRelative:
    """Limits a norm to ``relative`` times the moving average of the clipped norms.

    In the first ``warmup`` steps the total norm of all scopes is clipped to ``max_norm``, and the average is the
    smallest clipped norm so far.

    Source: Wang et al. 2025, "AdaGC: Improving training stability for large language model pretraining", algorithm 1.

    Raises:
        ValueError: ``relative`` is not positive, ``beta`` is not in [0, 1), or ``warmup`` is less than 1.
    """

    def __init__(
        self,
        relative: float = 1.05,
        beta: float = 0.98,
        warmup: int = 100,
        max_norm: float | None = 1.0,
    ) -> None:
        if not relative > 0 or not 0 <= beta < 1 or warmup < 1:
            raise ValueError(
                "ClipRelative: expected relative > 0, beta in [0, 1) and warmup >= 1, "
                f"got {relative}, {beta}, {warmup}"
            )
        self.relative, self.beta, self.warmup = relative, beta, warmup
        self.max_norm = math.inf if max_norm is None else max_norm
        self.steps = 0
        self.average = math.inf

    def coefficient(self, norm: float, total: float | None = None) -> float:
        """Returns the factor for a step with this norm; ``total`` is the norm of all scopes, by default ``norm``."""
        if norm == 0:
            return 1.0
        warms_up = self.steps < self.warmup
        if warms_up:
            coefficient = clip_coefficient(self.max_norm, norm if total is None else total)
        else:
            coefficient = clip_coefficient(self.relative * self.average, norm)
        clipped = coefficient * norm
        if _teaches(norm) and clipped > 0:
            self.steps += 1
            if warms_up:
                self.average = min(self.average, clipped)
            else:
                self.average = self.beta * self.average + (1 - self.beta) * clipped
        return coefficient


class ClipAdaptive:
    """Limits each output unit's gradient to ``clipping`` times the norm of the unit's parameters, at least ``eps``.

    A unit is an index of the first dimension of an array of two or more dimensions, or else the whole array. Norms are
    2-norms. Unlike the other policies it takes parameters and gradients: ``coefficients(param, grad)`` returns the
    factors, which broadcast.

    Source: Brock et al. 2021, "High-performance large-scale image recognition without normalization", equation 3.

    Raises:
        ValueError: ``clipping`` is not positive, or ``eps`` is negative.
    """

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3) -> None:
        if not clipping > 0 or not eps >= 0:
            raise ValueError(
                f"ClipAdaptive: expected clipping > 0 and eps >= 0, got {clipping}, {eps}"
            )
        self.clipping, self.eps = clipping, eps

    def coefficients(self, param: Array, grad: Array) -> Array:
        """Returns the factor of each unit, in the shape (units, 1, 1, ...)."""
        limits = self.clipping * np.maximum(_unit_norms(param), self.eps)
        norms = _unit_norms(grad)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(norms <= limits, 1.0, limits / norms)


def _unit_norms(array: Array) -> Array:
    units = np.asarray(array, dtype=np.float64)
    if units.ndim < 2:
        return np.asarray(tensor_norm(units))
    norms = np.array([tensor_norm(unit) for unit in units])
    return norms.reshape(-1, *[1] * (units.ndim - 1))


class Damp:
    """Shrinks norms above ``max_norm``: the factor is ``(max_norm / N) ** power``.

    Raises:
        ValueError: ``power`` is not in (0, 1].
    """

    def __init__(self, max_norm: float, power: float = 0.5) -> None:
        if not 0 < power <= 1:
            raise ValueError(f"Damp: power: expected a number > 0 and <= 1, got {power}")
        self.max_norm, self.power = max_norm, power

    def coefficient(self, norm: float) -> float:
        """Returns the factor for a step with this norm."""
        return (self.max_norm / norm) ** self.power if norm > self.max_norm else 1.0


class SkipSpikes:
    """Skips steps whose norm is above ``mean + sigma * std`` of the last ``window`` norms, without this step's norm.

    ``std`` is that of a sample (n - 1). No step is skipped before there are ``window // 2`` norms, and at least 2. The
    norm of a skipped step enters the window, too.

    Source: OLMo-core, ``SkipStepOptimizer``.

    Raises:
        ValueError: ``sigma`` is not positive, or ``window`` is less than 2.
    """

    def __init__(self, sigma: float = 6.0, window: int = 128) -> None:
        if not sigma > 0 or window < 2:
            raise ValueError(
                f"SkipSpikes: expected sigma > 0 and window >= 2, got {sigma}, {window}"
            )
        self.sigma, self.window = sigma, window
        self.norms: list[float] = []

    def skips(self, norm: float) -> bool:
        """Returns whether a step with this norm is skipped."""
        if not _teaches(norm):
            return False
        before = self.norms
        self.norms = [*before, norm][-self.window :]
        if len(before) < max(2, self.window // 2):
            return False
        limit = np.mean(before) + self.sigma * np.std(before, ddof=1)
        return bool(norm > limit)
