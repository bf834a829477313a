"""The definitions of policies, compared with hand-made numbers and the sources' own procedures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steadygrad.reference.policies import (
    ClipAdaptive,
    ClipPercentile,
    ClipRelative,
    ClipZScore,
    Damp,
    SkipSpikes,
)
from tests.policies.policy_runs import finite, recorded_norms


def limit_of(coefficient: float, norm: float) -> float:
    return coefficient * (norm + 1e-6)


def test_a_percentile_is_of_the_history_with_this_norm() -> None:
    policy, history = ClipPercentile(10), []
    for norm in finite(recorded_norms(80)):
        coefficient = policy.coefficient(norm)
        if norm == 0:
            assert coefficient == 1
            continue
        history.append(norm)
        limit = np.percentile(history, 10)
        assert math.isclose(limit_of(coefficient, norm), min(limit, norm + 1e-6), rel_tol=1e-12)


def test_a_percentile_forgets() -> None:
    policy = ClipPercentile(100, window=3)
    for norm in (9.0, 1.0, 2.0):
        policy.coefficient(norm)
    assert policy.coefficient(3.0) == pytest.approx(3.0 / (3.0 + 1e-6))
    assert policy.norms == [1.0, 2.0, 3.0]


def test_zscores_as_the_authors_compute_them() -> None:
    # This is github.com/bluorion-com/ZClip, mode zscore with adaptive scaling, in its order of operations.
    norms = [n for n in finite(recorded_norms(300)) if n > 0]
    policy = ClipZScore(2.5, 0.97, 25, max_norm=None)
    mean, var = float(np.mean(norms[:25])), float(np.var(norms[:25]))
    spikes = 0
    for step, norm in enumerate(norms):
        coefficient = policy.coefficient(norm)
        if step < 25:
            assert coefficient == 1
            continue
        z = (norm - mean) / (var**0.5 + 1e-6)
        clipped = norm
        if z > 2.5:
            spikes += 1
            clipped = mean + 2.5 * var**0.5 / (z / 2.5)
            assert math.isclose(limit_of(coefficient, norm), clipped, rel_tol=1e-9)
        else:
            assert coefficient == 1
        mean = 0.97 * mean + 0.03 * clipped
        var = 0.97 * var + 0.03 * (clipped - mean) ** 2
    assert 5 < spikes < 60


def test_a_zscores_cap_holds_always() -> None:
    policy = ClipZScore(max_norm=0.5, warmup=2)
    assert [policy.coefficient(4.0) for _ in range(4)] == [0.5 / (4 + 1e-6)] * 4


def test_relative_limits_follow_algorithm_1() -> None:
    policy = ClipRelative(1.5, 0.5, warmup=2, max_norm=2.0)
    assert policy.coefficient(3.0, total=4.0) == 2.0 / (4 + 1e-6)  # leaves 1.5
    assert policy.coefficient(1.0, total=1.0) == 1  # leaves 1
    assert policy.average == 1.0
    assert policy.coefficient(3.0, total=100.0) == 1.5 / (3 + 1e-6)
    assert policy.average == pytest.approx(0.5 * 1.0 + 0.5 * 1.5, rel=1e-6)
    assert policy.coefficient(0.0) == 1 and policy.steps == 3


def test_units_are_limited_relative_to_their_parameters() -> None:
    policy = ClipAdaptive(0.1, eps=0.5)
    weight = np.array([[3.0, 4.0], [0.0, 0.1], [6.0, 8.0]])
    grad = np.array([[3.0, 4.0], [0.0, 0.2], [0.0, 0.5]])
    coefficients = policy.coefficients(weight, grad)
    assert np.allclose(coefficients, [[0.5 / 5], [0.05 / 0.2], [1.0]])
    filters = policy.coefficients(weight.reshape(3, 1, 2), grad.reshape(3, 1, 2))
    assert filters.shape == (3, 1, 1) and np.array_equal(filters[:, 0], coefficients)
    vector = policy.coefficients(weight[0], grad[0])
    assert vector.shape == () and vector == 0.5 / 5
    assert policy.coefficients(np.array(7.0), np.array(-0.7)) == 1
    assert policy.coefficients(np.zeros(3), np.array([0.0, 0.0, 1.0])) == 0.05
    bad = policy.coefficients(weight, np.array([[1.0, np.inf], [np.nan, 0.0], [0.0, 0.0]]))
    assert np.array_equal(bad, [[0.0], [np.nan], [1.0]], equal_nan=True)


def test_damping_shrinks_and_keeps_the_order() -> None:
    policy = Damp(1.0, 0.5)
    clipped = [policy.coefficient(norm) * norm for norm in (0.5, 1.0, 4.0, 100.0)]
    assert clipped == [0.5, 1.0, 2.0, 10.0]
    assert Damp(2.0, 1.0).coefficient(8.0) == 0.25


def test_spikes_are_above_six_deviations() -> None:
    policy = SkipSpikes(6.0, window=4)
    assert [policy.skips(norm) for norm in (1.0, 1e9)] == [False, False]  # too few to judge by
    policy = SkipSpikes(6.0, window=4)
    for norm in (1.0, 1.2, 0.8, 1.0):
        assert not policy.skips(norm)
    limit = 1.0 + 6 * np.std([1.0, 1.2, 0.8, 1.0], ddof=1)
    assert policy.skips(limit * 1.001)
    assert policy.norms[-1] == limit * 1.001
    for norm in (1.0, 1.2, 0.8, 1.0):
        assert not policy.skips(norm)
    assert not policy.skips(limit * 0.999)
    assert not policy.skips(0.0) and not policy.skips(math.nan) and not policy.skips(math.inf)
