from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from steadygrad.reference.batch_norm import (
    CEILINGS,
    Statistics,
    batch_norm,
    batch_norm_backward,
    channel_statistics,
    combine_statistics,
    update_running_statistics,
)
from tests.tolerances import assert_close

Array = NDArray[np.float64]
SHAPES = [(6, 5), (3, 4, 7), (2, 3, 4, 5), (2, 3, 2, 3, 2), (2, 1), (1, 3, 2), (33, 1, 1)]
AFFINE = [(True, True), (True, False), (False, True), (False, False)]
EPS = 1e-3


def vectors(
    channels: int, affine: tuple[bool, bool], rng: np.random.Generator
) -> tuple[Array | None, Array | None]:
    """Return weight and bias, each None if ``affine`` says so."""
    weight, bias = rng.normal(size=(2, channels))
    return (weight if affine[0] else None), (bias if affine[1] else None)


def tensor(array: Array | None, requires_grad: bool = True) -> Any:
    return None if array is None else torch.tensor(array, requires_grad=requires_grad)


def statistics_for(
    x: Array, training: bool, rng: np.random.Generator
) -> tuple[Statistics, Array, Array]:
    """Return statistics that normalise ``x``, with the running ones that torch is given."""
    running_mean, running_var = rng.normal(size=x.shape[1]), rng.uniform(0.1, 3, size=x.shape[1])
    if training:
        return channel_statistics(x), running_mean, running_var
    return Statistics(running_mean, running_var, 0), running_mean, running_var


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", CEILINGS)
@pytest.mark.parametrize("affine", AFFINE, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_and_its_gradients(
    shape: tuple[int, ...],
    training: bool,
    affine: tuple[bool, bool],
    activation: str | None,
    residual: bool,
    rng: np.random.Generator,
) -> None:
    x, grad_output, added = rng.normal(2, 3, size=(3, *shape))
    weight, bias = vectors(shape[1], affine, rng)
    statistics, running_mean, running_var = statistics_for(x, training, rng)
    other = added if residual else None

    leaves = [tensor(array) for array in (x, other, weight, bias)]
    y = F.batch_norm(
        leaves[0], *map(torch.tensor, (running_mean, running_var)), *leaves[2:], training, 0.1, EPS
    )
    y = y + leaves[1] if residual else y
    y = {None: y, "relu": F.relu(y), "relu6": F.relu6(y)}[activation]
    y.backward(torch.tensor(grad_output))

    arguments: Any = (x, statistics, weight, bias, EPS, other, activation)
    assert_close(batch_norm(*arguments), y, torch.float64)
    gradients = batch_norm_backward(grad_output, *arguments, constant_statistics=not training)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        if leaf is not None:
            assert_close(gradient, leaf.grad, torch.float64)


@pytest.mark.parametrize("name", ["input", "residual", "weight", "bias"])
@pytest.mark.parametrize("activation", CEILINGS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_gradients_are_finite_differences(
    training: bool, activation: str | None, name: str, rng: np.random.Generator
) -> None:
    shape, step = (3, 2, 3), 1e-6
    x, added, grad_output = rng.normal(size=(3, *shape))
    weight, bias = rng.normal(size=(2, shape[1]))
    constant = statistics_for(x, False, rng)[0]
    values = {"input": x, "residual": added, "weight": weight, "bias": bias}

    def statistics() -> Statistics:
        return channel_statistics(values["input"]) if training else constant

    def loss() -> float:
        arguments = values["weight"], values["bias"], EPS, values["residual"], activation
        return float(np.sum(grad_output * batch_norm(values["input"], statistics(), *arguments)))

    got = batch_norm_backward(
        grad_output, x, statistics(), weight, bias, EPS, added, activation, not training
    )
    want = np.empty_like(values[name])
    for index in np.ndindex(want.shape):
        original = values[name][index]
        values[name][index] = original + step
        above = loss()
        values[name][index] = original - step
        want[index] = (above - loss()) / (2 * step)
        values[name][index] = original
    np.testing.assert_allclose(getattr(got, name), want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.3, None])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_running_statistics_equal_torch_over_several_batches(
    shape: tuple[int, ...], momentum: float | None, rng: np.random.Generator
) -> None:
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    module = kinds[max(len(shape) - 3, 0)](shape[1], momentum=momentum, dtype=torch.float64)
    mean, var = np.zeros(shape[1]), np.ones(shape[1])
    for batch in range(1, 4):
        x = rng.normal(2, 3, size=shape)
        module(torch.tensor(x))
        mean, var = update_running_statistics(mean, var, channel_statistics(x), momentum, batch)
        assert_close(mean, module.running_mean, torch.float64)
        assert_close(var, module.running_var, torch.float64)


def test_cumulative_average_is_the_mean_over_the_batches(rng: np.random.Generator) -> None:
    batches = [channel_statistics(rng.normal(2, 3, size=(4, 3, 5))) for _ in range(7)]
    mean, var = np.full(3, 9.0), np.full(3, 9.0)
    for number, statistics in enumerate(batches, 1):
        mean, var = update_running_statistics(mean, var, statistics, None, number)
    np.testing.assert_allclose(mean, np.mean([s.mean for s in batches], axis=0), rtol=1e-13)
    unbiased = [s.var * s.count / (s.count - 1) for s in batches]
    np.testing.assert_allclose(var, np.mean(unbiased, axis=0), rtol=1e-13)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_combined_parts_are_the_whole(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = rng.normal(5, 2, size=(sum(sizes), 3, 2))
    parts = np.split(whole, np.cumsum(sizes)[:-1])
    combined = combine_statistics(map(channel_statistics, parts))
    want = channel_statistics(whole)
    assert combined.count == want.count == 2 * sum(sizes)
    np.testing.assert_allclose(combined.mean, want.mean, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(combined.var, want.var, rtol=1e-12, atol=1e-13)


def test_empty_parts_are_not_looked_at() -> None:
    empty = Statistics(np.array([math.nan, math.inf]), np.array([math.nan, 1.0]), 0)
    full = Statistics(np.array([1.0, 2.0]), np.array([3.0, 4.0]), 5)
    for parts in ([empty, full], [full, empty, empty]):
        combined = combine_statistics(parts)
        np.testing.assert_array_equal(combined.mean, full.mean)
        np.testing.assert_array_equal(combined.var, full.var)
        assert combined.count == 5
    assert combine_statistics([empty]).count == 0
    np.testing.assert_array_equal(combine_statistics([empty]).var, [0.0, 0.0])


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e8, 1e12])
def test_nothing_cancels(shift: float) -> None:
    x = shift + np.arange(-8.0, 9.0).reshape(17, 1)  # its sums, mean and variance are exact
    statistics = channel_statistics(x)
    np.testing.assert_array_equal(statistics.mean, [shift])
    np.testing.assert_allclose(statistics.var, [24.0], rtol=1e-14)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e3 / 3, 1e18, 1e-310])
def test_constant_channel_has_no_variance(value: float) -> None:
    x = np.full((3, 2, 7), value)
    statistics = channel_statistics(x)
    np.testing.assert_allclose(statistics.mean, value, rtol=1e-15, atol=5e-324)
    assert statistics.var.max() <= abs(value * 1e-15) ** 2
    np.testing.assert_allclose(batch_norm(x, statistics, eps=1.0), 0.0, atol=abs(value) * 1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_elements_stay_in_their_channel(value: float, rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 2, 4))
    x[1, 1, 2] = value
    statistics = channel_statistics(x)
    np.testing.assert_equal(statistics.mean[1], value)
    assert math.isnan(statistics.var[1])
    alone = channel_statistics(x[:, :1])
    assert_close(statistics.mean[:1], alone.mean, torch.float64)
    assert_close(statistics.var[:1], alone.var, torch.float64)
    y = batch_norm(x, statistics, activation="relu")
    assert np.isnan(y[:, 1]).all() and np.isfinite(y[:, 0]).all()
    gradients = batch_norm_backward(np.ones_like(x), x, statistics, activation="relu")
    np.testing.assert_array_equal(gradients.residual[:, 1], 1.0)  # NaN lets its gradient through
    assert np.isfinite(gradients.input[:, 0]).all()


def test_empty_batch() -> None:
    x = np.zeros((0, 3, 4))
    statistics = channel_statistics(x)
    np.testing.assert_array_equal([statistics.mean, statistics.var], np.zeros((2, 3)))
    assert statistics.count == 0
    assert batch_norm(x, statistics).shape == (0, 3, 4)
    gradients = batch_norm_backward(x, x, statistics)
    assert gradients.input.shape == (0, 3, 4)
    np.testing.assert_array_equal([gradients.weight, gradients.bias], np.zeros((2, 3)))


def test_wrong_arguments_are_refused() -> None:
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match="activation must be None, 'relu' or 'relu6', got 'gelu'"):
        batch_norm(x, channel_statistics(x), activation="gelu")
    with pytest.raises(ValueError, match="activation must be None, 'relu' or 'relu6', got 'gelu'"):
        batch_norm_backward(x, x, channel_statistics(x), activation="gelu")
    with pytest.raises(ValueError, match="parts must hold at least one, got none"):
        combine_statistics([])


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_statistics_that_are_not_finite_stay_out_of_the_running_ones(
    momentum: float | None,
) -> None:
    x = np.random.default_rng(0).normal(size=(6, 4, 3))
    x[0, 0, 0], x[1, 1, 1], x[:, 2] = np.inf, np.nan, x[:, 2] * 1e300
    statistics = channel_statistics(x)
    running = np.full(4, 2.0), np.full(4, 3.0)
    mean, var = update_running_statistics(*running, statistics, momentum, 3)
    np.testing.assert_array_equal(mean[:3], 2.0)
    np.testing.assert_array_equal(var[:3], 3.0)
    factor = 1 / 3 if momentum is None else momentum
    np.testing.assert_allclose(mean[3], (1 - factor) * 2 + factor * x[:, 3].mean())
    np.testing.assert_allclose(var[3], (1 - factor) * 3 + factor * x[:, 3].var(ddof=1))
