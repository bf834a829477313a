"""The definition of the roundings, compared with torch's and NumPy's own, and what each is good for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steadygrad.reference import rounding
from tests.tolerances import float64

DTYPES = ["bfloat16", "float16"]


def any_floats(count: int, seed: int = 0) -> np.ndarray:
    """Return float32 numbers of every size, with NaN and infinities among them."""
    words = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    values = words.view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), values)


def ordinary_floats(dtype: str, count: int, seed: int = 0) -> np.ndarray:
    """Return float32 numbers around and within the format's range, with subnormal ones among them."""
    generator = np.random.default_rng(seed)
    low = rounding.FORMATS[dtype].min_exponent - 12
    exponents = generator.uniform(low if dtype == "float16" else -130, 17, count)
    return (generator.standard_normal(count) * 2.0**exponents).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_what_torch_does(dtype: str) -> None:
    values = np.concatenate([any_floats(20000), ordinary_floats(dtype, 20000)])
    want = float64(torch.from_numpy(values).to(getattr(torch, dtype)))
    got = rounding.round_nearest(values, dtype)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got)[want == 0], np.signbit(want)[want == 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_takes_one_of_the_two_neighbours(dtype: str) -> None:
    values = np.concatenate([any_floats(20000), ordinary_floats(dtype, 20000)])
    words = rounding.random_words(3, 4, 5, values.size)
    got = rounding.round_stochastic(values, dtype, words)
    np.testing.assert_array_equal(rounding.round_nearest(got, dtype), got)
    inside = np.abs(values.astype(np.float64)) < rounding.FORMATS[dtype].largest
    np.testing.assert_array_equal(got[~inside], rounding.round_nearest(values, dtype)[~inside])
    exact = values[inside].astype(np.float64)
    spacing = rounding.FORMATS[dtype].spacing(exact)
    assert (np.abs(got[inside] - exact) < spacing).all()
    assert (np.abs(got[inside]) <= rounding.FORMATS[dtype].largest).all()
    representable = rounding.round_nearest(exact, dtype) == exact
    np.testing.assert_array_equal(got[inside][representable], exact[representable])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
def test_stochastic_has_the_value_as_its_mean(dtype: str, scale: float) -> None:
    draws, count = 4000, 64
    values = (np.random.default_rng(1).uniform(1, 2, count) * scale).astype(np.float32)
    words = np.stack([rounding.random_words(7, step, 0, count) for step in range(draws)])
    got = rounding.round_stochastic(np.broadcast_to(values, words.shape), dtype, words)
    spacing = rounding.FORMATS[dtype].spacing(values)
    # The mean of so many draws with variance r (1 - r) <= 1/4 deviates by more than 5 of its standard deviations once
    # in millions of times; the same holds for the mean error over all values.
    error = (got.mean(axis=0) - values) / spacing
    assert np.abs(error).max() < 5 * 0.5 / draws**0.5
    assert abs(error.mean()) < 5 * 0.5 / (draws * count) ** 0.5


def test_random_words_are_uniform_and_differ_by_all_that_they_depend_on() -> None:
    base = {"seed": 1, "step": 2, "place": 3}
    words = rounding.random_words(**base, numel=20000)
    ones = [(words >> np.uint32(bit) & np.uint32(1)).mean() for bit in range(32)]
    assert np.abs(np.array(ones) - 0.5).max() < 5 * 0.5 / 20000**0.5
    assert len(np.unique(words)) > 19990
    for key in base:
        other = rounding.random_words(**{**base, key: base[key] + 1}, numel=20000)
        same_top = (other >> np.uint32(16) == words >> np.uint32(16)).mean()
        assert same_top < 20 / 2**16
        correlation = np.corrcoef(other.astype(np.float64), words.astype(np.float64))[0, 1]
        assert abs(correlation) < 5 / 20000**0.5
    assert np.array_equal(rounding.random_words(**base, numel=100), words[:100])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compensation_belongs_to_its_parameter_and_holds_what_it_can(dtype: str) -> None:
    values = np.concatenate([any_floats(20000), ordinary_floats(dtype, 40000)])
    param, compensation = rounding.kahan_split(values, dtype)
    got = rounding.kahan_value(param, compensation, dtype)
    finite = np.isfinite(param)
    np.testing.assert_array_equal(got[~finite], param[~finite])
    exact = values[finite].astype(np.float64)
    # The compensation is below half a spacing of the parameter, and is rounded to its own spacing.
    allowed = rounding.FORMATS[dtype].spacing(exact - param[finite]) / 2
    assert (
        np.abs(got[finite] - exact) <= allowed + np.spacing(np.abs(exact), dtype=np.float64)
    ).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_written_by_somebody_else_counts_alone(dtype: str) -> None:
    values = ordinary_floats(dtype, 1000)
    written = rounding.round_nearest(np.roll(values, 1) * 1.01, dtype)
    param, compensation = rounding.kahan_split(values, dtype)
    half = rounding.FORMATS[dtype].spacing(written) / 2
    beyond = np.abs(compensation) > 1.02 * half
    assert beyond.sum() > 100
    got = rounding.kahan_value(written, compensation, dtype)
    np.testing.assert_array_equal(got[beyond], written[beyond])
    changed = written != param
    assert changed.sum() > 900
    master = rounding.master_value(written, values, dtype)
    np.testing.assert_array_equal(master[changed], written[changed])
    np.testing.assert_array_equal(rounding.master_value(param, values, dtype), values)
