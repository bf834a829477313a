from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadygrad import reference
from tests.tolerances import assert_close

INF = math.inf


def with_grads(arrays: list[np.ndarray]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros(array.shape, dtype=torch.float64)) for array in arrays]
    for param, array in zip(params, arrays, strict=True):
        param.grad = torch.tensor(array)
    return params


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.5, 3.0, INF, -INF])
@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e3, INF])
def test_clip_grad_norm_equals_torch(
    max_norm: float, norm_type: float, rng: np.random.Generator
) -> None:
    arrays = [rng.normal(size=shape) for shape in [(33,), (4, 5), ()]]
    params = with_grads(arrays)
    expected_norm = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    clipped, norm = reference.clip.clip_grad_norm(arrays, max_norm, norm_type)
    assert_close(norm, expected_norm, torch.float64)
    for actual, param in zip(clipped, params, strict=True):
        assert_close(actual, param.grad, torch.float64)


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_clip_grad_norm_of_nonfinite_gradients_equals_torch(max_norm: float, value: float) -> None:
    arrays = [np.array([1.0, value, 0.0]), np.array([-2.0])]
    params = with_grads(arrays)
    expected_norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    clipped, norm = reference.clip.clip_grad_norm(arrays, max_norm)
    assert_close(norm, expected_norm, torch.float64)
    for actual, param in zip(clipped, params, strict=True):
        assert_close(actual, param.grad, torch.float64)


@pytest.mark.parametrize("value", [math.nan, INF])
def test_an_infinite_limit_never_clips_where_torch_makes_every_gradient_nan(value: float) -> None:
    arrays = [np.array([1.0, value, 0.0]), np.array([-2.0])]
    params = with_grads(arrays)
    torch.nn.utils.clip_grad_norm_(params, INF)
    assert all(bool(param.grad.isnan().all()) for param in params if param.grad is not None)
    clipped, _ = reference.clip.clip_grad_norm(arrays, INF)
    for one, other in zip(clipped, arrays, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("magnitude", [3e19, 1e200])
def test_clip_grad_norm_of_huge_gradients(magnitude: float) -> None:
    clipped, norm = reference.clip.clip_grad_norm([np.array([3.0, -4.0]) * magnitude], 1.0)
    assert norm == pytest.approx(5 * magnitude, rel=1e-15)
    np.testing.assert_allclose(clipped[0], [0.6, -0.8], rtol=1e-15)


def test_clip_grad_norm_does_not_write_its_input() -> None:
    grad = np.array([3.0, 4.0])
    reference.clip.clip_grad_norm([grad], 1.0)
    assert grad.tolist() == [3.0, 4.0]


def test_clip_grad_norm_of_an_empty_list() -> None:
    assert reference.clip.clip_grad_norm([], 1.0) == ([], 0.0)


@pytest.mark.parametrize("clip_value", [0.0, 0.5, INF])
def test_clip_grad_value_equals_torch(clip_value: float, rng: np.random.Generator) -> None:
    arrays = [rng.normal(size=(3, 4)), np.array([math.nan, INF, -INF, 0.0])]
    params = with_grads(arrays)
    torch.nn.utils.clip_grad_value_(params, clip_value)
    clipped = reference.clip.clip_grad_value(arrays, clip_value)
    for actual, param in zip(clipped, params, strict=True):
        assert_close(actual, param.grad, torch.float64)


@pytest.mark.parametrize(
    ("limit", "norm", "expected"),
    [
        (1.0, 0.0, 1.0),
        (0.0, 0.0, 0.0),
        (0.0, 5.0, 0.0),
        (1.0, INF, 0.0),
        (INF, 5.0, 1.0),
        (1.0, math.nan, math.nan),
        (INF, math.nan, 1.0),
        (INF, INF, 1.0),
        (1.0, 1.0, 1.0 / (1.0 + 1e-6)),
    ],
)
def test_clip_coefficient_at_the_edges(limit: float, norm: float, expected: float) -> None:
    np.testing.assert_equal(reference.clip.clip_coefficient(limit, norm), expected)


@given(st.floats(0, 1e100), st.floats(0, 1e100))
def test_clip_coefficient_brings_the_norm_under_the_limit(limit: float, norm: float) -> None:
    coefficient = reference.clip.clip_coefficient(limit, norm)
    assert 0 <= coefficient <= 1
    assert coefficient * norm <= limit * (1 + 1e-15)


@given(st.floats(0, 1e308), st.floats(0, INF) | st.just(math.nan))
def test_clip_coefficient_equals_torch(limit: float, norm: float) -> None:
    expected = torch.clamp(limit / (torch.tensor(norm, dtype=torch.float64) + 1e-6), max=1.0)
    assert_close(reference.clip.clip_coefficient(limit, norm), expected, torch.float64)
