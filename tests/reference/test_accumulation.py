from __future__ import annotations

import math

import numpy as np
import pytest

from steadygrad import reference

mean = reference.accumulation.accumulated_mean


def test_without_arguments_it_is_the_mean(rng: np.random.Generator) -> None:
    grads = rng.normal(size=(7, 3, 5))
    np.testing.assert_allclose(mean(list(grads)), grads.mean(axis=0), rtol=1e-14)


def test_sums_over_tokens_and_their_counts_give_the_mean_over_all_tokens(
    rng: np.random.Generator,
) -> None:
    tokens = [3, 11, 0, 6]
    rows = [rng.normal(size=(count, 4)) for count in tokens]
    sums = [part.sum(axis=0) for part in rows]
    np.testing.assert_allclose(mean(sums, tokens), np.concatenate(rows).mean(axis=0), rtol=1e-13)


def test_decay_is_the_closed_form(rng: np.random.Generator) -> None:
    grads, weights, decay = rng.normal(size=(5, 6)), rng.uniform(size=5), 0.7
    powers = decay ** np.arange(4, -1, -1)
    want = (powers[:, None] * grads).sum(axis=0) / (powers * weights).sum()
    np.testing.assert_allclose(mean(list(grads), list(weights), decay), want, rtol=1e-14)


def test_one_bad_element_stays() -> None:
    result = mean([np.array([1.0, math.inf]), np.array([2.0, -math.inf])], decay=0.5)
    assert result[0] == pytest.approx(2.5 / 1.5) and math.isnan(result[1])


@pytest.mark.parametrize(
    ("weights", "decay"),
    [([1.0], 1.0), ([1.0, -1.0], 1.0), ([1.0, math.nan], 1.0), ([0.0, 0.0], 1.0)]
    + [([1.0, 1.0], bad) for bad in (0.0, -0.5, 1.5, math.nan)],
)
def test_bad_arguments(weights: list[float], decay: float) -> None:
    with pytest.raises(ValueError, match="accumulated_mean"):
        mean([np.ones(2), np.ones(2)], weights, decay)
