from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadygrad import reference
from tests.tolerances import assert_close

STRENGTHS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)]

param_lists = st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), max_size=4)
strengths = st.floats(0, 10)


@given(param_lists, strengths, strengths)
def test_penalty_equals_autograd(lists: list[list[float]], l1: float, l2: float) -> None:
    params = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in lists]
    zero = torch.zeros((), dtype=torch.float64)
    penalty = sum((l1 * p.abs().sum() + l2 / 2 * p.square().sum() for p in params), zero)
    assert_close(reference.penalty.penalty_value(lists, l1, l2), penalty, torch.float64)
    for values, param in zip(lists, params, strict=True):
        (expected,) = torch.autograd.grad(penalty, param, retain_graph=True)
        actual = reference.penalty.penalty_gradient(values, l1, l2)
        assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize(("l1", "l2"), STRENGTHS)
def test_penalty_gradient_of_special_values(l1: float, l2: float) -> None:
    values = np.array([0.0, -0.0, 5e-324, -5e-324, math.inf, -math.inf, math.nan])
    actual = reference.penalty.penalty_gradient(values, l1, l2)
    tensor = torch.as_tensor(values)
    assert_close(actual, l1 * tensor.sign() + (l2 * tensor if l2 else 0.0), torch.float64)


def test_penalty_value_of_nothing() -> None:
    assert reference.penalty.penalty_value([], 1.0, 1.0) == 0.0
    assert reference.penalty.penalty_value([np.zeros((0, 2))], 1.0, 1.0) == 0.0


@given(st.lists(st.floats(-10, 10), max_size=9), st.floats(0, 5))
def test_soft_threshold_equals_torch(values: list[float], amount: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    expected = torch.nn.functional.softshrink(tensor, amount)
    assert_close(reference.penalty.soft_threshold(values, amount), expected, torch.float64)


def test_soft_threshold_gives_exact_zeros_and_keeps_nan() -> None:
    param = np.array([-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0, math.nan])
    result = reference.penalty.soft_threshold(param, 0.5)
    np.testing.assert_array_equal(result, [-1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.5, math.nan])
    assert param[0] == -2.0
