"""Computes the policies' limits in NumPy, as ``csrc/core/policy.h`` does, for steps that no kernel takes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from steadygrad import _kernels
from steadygrad.policies.adaptive import ClipAdaptive
from steadygrad.policies.clip_policy import ClipPolicy
from steadygrad.policies.constant import Damp
from steadygrad.policies.history import ClipPercentile, SkipSpikes
from steadygrad.policies.moving_average import ClipRelative, ClipZScore
from steadygrad.reference.clip import clip_coefficient

Row = NDArray[np.float64]

COEFFICIENT, LIMIT, NORM, _COUNT, _OLDEST, _NORMS = (
    _kernels.POLICY_ROW[name]
    for name in ("coefficient", "limit", "norm", "count", "oldest", "norms")
)
_MEAN, _VARIANCE = _COUNT + 1, _COUNT + 2


def apply_policy(policy: ClipPolicy, row: Row, norm: float, total: float) -> None:
    """Writes a scope's coefficient and limit into its row, and updates what the policy has learnt from norms.

    Args:
        policy: Clip policy of the optimizer. A policy written in Python has put its limit into the row already.
        row: Row of the scope, changed in place.
        norm: Norm of the scope.
        total: Norm of all scopes; the policy learns nothing if it is not finite.
    """
    enters = math.isfinite(total) and _is_entered(norm)
    coefficient = 1.0
    if isinstance(policy, ClipPercentile):
        if enters:
            _enter(row, policy.window, norm)
            _sort(row, policy.window)
        row[LIMIT] = limit = _percentile(row, policy)
        coefficient = clip_coefficient(limit, norm)
    elif isinstance(policy, ClipZScore):
        row[LIMIT] = limit = _zscore_limit(policy, row, norm, enters)
        coefficient = clip_coefficient(limit, norm)
    elif isinstance(policy, ClipRelative):
        coefficient = _relative_coefficient(policy, row, norm, total, enters)
    elif isinstance(policy, Damp):
        row[LIMIT] = policy.max_norm
        if norm > policy.max_norm:
            coefficient = (policy.max_norm / norm) ** policy.power
    elif isinstance(policy, ClipAdaptive):
        row[LIMIT] = math.nan
    elif row[LIMIT] >= 0:
        coefficient = clip_coefficient(float(row[LIMIT]), norm)
    row[COEFFICIENT] = 1.0 if norm == 0 else coefficient


def is_spike(policy: SkipSpikes, row: Row, norm: float) -> bool:
    """Returns whether a step with this norm is skipped as a spike, judged by the norms before it."""
    count = int(row[_COUNT])
    if not _is_entered(norm) or count < max(2, policy.window // 2):
        return False
    norms = row[_NORMS : _NORMS + count]
    with np.errstate(over="ignore"):
        return bool(norm > norms.mean() + policy.sigma * norms.std(ddof=1))


def enter_spike(policy: SkipSpikes, row: Row, norm: float) -> None:
    """Adds a norm, even that of a spike, to the norms by which later steps are judged."""
    if _is_entered(norm):
        _enter(row, policy.window, norm)


def _is_entered(norm: float) -> bool:
    return norm > 0 and math.isfinite(norm)


def _enter(row: Row, window: int, norm: float) -> None:
    oldest = int(row[_OLDEST])
    row[_NORMS + oldest] = norm
    row[_OLDEST] = (oldest + 1) % window
    row[_COUNT] = min(row[_COUNT] + 1, window)


def _sort(row: Row, window: int) -> None:
    count = int(row[_COUNT])
    begin = _NORMS + window
    row[begin : begin + count] = np.sort(row[_NORMS : _NORMS + count])


def _percentile(row: Row, policy: ClipPercentile) -> float:
    count = int(row[_COUNT])
    begin = _NORMS + policy.window
    norms = row[begin : begin + count]
    return float(np.percentile(norms, policy.percentile)) if count else math.inf


def _zscore_limit(policy: ClipZScore, row: Row, norm: float, enters: bool) -> float:
    cap = math.inf if policy.max_norm is None else float(policy.max_norm)
    count, mean, variance = (float(row[at]) for at in (_COUNT, _MEAN, _VARIANCE))
    if count < policy.warmup:
        if enters:
            row[_COUNT] = count + 1
            row[_MEAN] = moved = mean + (norm - mean) / (count + 1)
            # Until the warm-up ends, the row holds the sum of squared deviations in place of the variance.
            squares = variance + (norm - mean) * (norm - moved)
            row[_VARIANCE] = squares if count + 1 < policy.warmup else squares / (count + 1)
        return cap
    deviation = math.sqrt(variance)
    z = (norm - mean) / (deviation + 1e-6)
    limit, fed = math.inf, norm
    if z > policy.z_threshold:
        spread = policy.z_threshold * deviation / (z / policy.z_threshold)
        fed = limit = (mean + spread) * policy.clip_factor
    if enters:
        row[_MEAN] = moved = policy.alpha * mean + (1 - policy.alpha) * fed
        squared = (fed - moved) * (fed - moved)
        row[_VARIANCE] = policy.alpha * variance + (1 - policy.alpha) * squared
    return min(limit, cap)


def _relative_coefficient(
    policy: ClipRelative, row: Row, norm: float, total: float, enters: bool
) -> float:
    count, average = float(row[_COUNT]), float(row[_MEAN])
    warms_up = count < policy.warmup
    by_total = warms_up or count == 0
    cap = math.inf if policy.max_norm is None else float(policy.max_norm)
    row[LIMIT] = limit = cap if by_total else policy.relative * average
    coefficient = clip_coefficient(limit, total if by_total else norm)
    clipped = coefficient * norm
    if enters and clipped > 0:
        row[_COUNT] = count + 1
        if count == 0:
            row[_MEAN] = clipped
        elif warms_up:
            row[_MEAN] = min(average, clipped)
        else:
            row[_MEAN] = policy.beta * average + (1 - policy.beta) * clipped
    return coefficient
