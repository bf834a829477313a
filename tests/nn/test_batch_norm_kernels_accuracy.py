"""Batch norm kernels on numbers that are hard to add, and in half precision compared with torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from steadygrad.nn.functional import batch_norm
from steadygrad.reference import batch_norm as reference
from steadygrad.reference.batch_norm import Statistics
from tests.backends import Backend
from tests.nn.batch_norm_calls import FUSIONS, LAYOUTS, Case, Shape
from tests.tolerances import (
    NORMALIZED_ERROR,
    STATISTICS_ERROR,
    assert_error_at_most_torch,
    float64,
)

HALVES = [torch.bfloat16, torch.float16]
SHAPES: list[Shape] = [(32, 8, 28, 28), (4096, 16), (2, 3, 50_021), (7, 65, 5, 7), (3, 130)]
SMALL: list[Shape] = [(4, 5, 9, 11), (300, 3), (2, 1, 2003), (3, 65)]

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_mean = pytest.mark.parametrize("mean", NORMALIZED_ERROR)


def cases(
    backend: Backend, layout: str, shapes: list[Shape] = SHAPES, **options: Any
) -> list[Case]:
    """Yield batch norms of several sizes, with and without weight and bias."""
    options = {"weight": None, "bias": None} | options
    return [Case(shape, backend.device, layout=layout, **options) for shape in shapes]


def assert_normalized(case: Case, largest_error: float) -> None:
    """Check outputs, absolutely up to magnitude 1 and relatively above, and the statistics."""
    exact = case.batch_statistics()
    output, _, statistics = case.forward()
    want = reference.batch_norm(*case.defined(exact))
    error = np.abs(float64(output) - want) / np.maximum(np.abs(want), 1)
    assert error.max() <= largest_error, case.shape
    assert_statistics(statistics, exact)


def assert_statistics(statistics: Tensor, exact: Statistics) -> None:
    """Compare the mean relative to the deviation, and the variance relative to itself."""
    channels = exact.mean.size
    mean, var = float64(statistics[:channels]), float64(statistics[channels:-1])
    assert np.all(np.abs(mean - exact.mean) <= STATISTICS_ERROR * np.sqrt(exact.var))
    assert np.all(np.abs(var - exact.var) <= STATISTICS_ERROR * exact.var)


@each_layout
@each_mean
def test_output(backend: Backend, mean: float, layout: str) -> None:
    for case in cases(backend, layout, mean=mean):
        assert_normalized(case, NORMALIZED_ERROR[mean])


@each_layout
@each_mean
@pytest.mark.parametrize("where", ["first", "first of each sample", "last", "first two"])
def test_output_with_outliers(backend: Backend, where: str, mean: float, layout: str) -> None:
    """Place an outlier, which must not be what all other elements are compared with."""
    for case in cases(backend, layout, mean=mean):
        values = case.array("input")
        samples = {"first of each sample": slice(None), "last": -1, "first two": slice(2)}
        index = (samples.get(where, 0), slice(None), *[-1 if where == "last" else 0] * 9)
        values[index[: values.ndim]] = mean + 1e4
        case.put("input", values)
        assert_normalized(case, NORMALIZED_ERROR[mean])


@each_layout
@pytest.mark.parametrize("kind", ["ramp", "steps", "alternating", "one hot", "far pair"])
def test_output_of_unusual_distributions(backend: Backend, kind: str, layout: str) -> None:
    for case in cases(backend, layout):
        flat = np.moveaxis(case.array("input"), 1, 0).reshape(case.channels, -1)
        count = flat.shape[1]
        position = np.arange(count)
        flat = {
            "ramp": np.broadcast_to(1000 + position / count, flat.shape),
            "steps": flat * 0.1 + 100 * (position * 7 // count),
            "alternating": 1000 + 1e-2 * flat + np.where(position % 2, 1.0, -1.0),
            "one hot": np.broadcast_to(position == count // 2, flat.shape),
            "far pair": flat * 1e-3 + np.where(position < count // 2, -500.0, 500.0),
        }[kind]
        moved = (case.channels, case.shape[0], *case.shape[2:])
        case.put("input", np.moveaxis(flat.reshape(moved).astype(np.float64), 0, 1))
        assert_normalized(case, NORMALIZED_ERROR[1000.0])


@each_layout
@each_mean
def test_gradients(backend: Backend, mean: float, layout: str) -> None:
    """Compare gradients, whose terms are relative to the deviation, whatever the mean is."""
    for case in cases(backend, layout, mean=mean, weight=torch.float32, bias=torch.float32):
        exact = case.batch_statistics()
        case.assert_gradients(case.backward(None, case.forward()[2]), exact)


@each_layout
def test_sums_of_equal_terms(backend: Backend, layout: str) -> None:
    """Sum equal terms, the worst case of a float32 sum, in which terms stop counting."""
    for case in cases(backend, layout, weight=torch.float32, bias=torch.float32):
        case.put("grad_output", np.full(case.shape, 1 / 3))
        exact = case.batch_statistics()
        case.assert_gradients(case.backward(None, case.forward()[2]), exact)


@each_layout
@pytest.mark.parametrize("scale", [1e18, 1e12, 1e-12, 1e-18])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_scale_is_without_effect(backend: Backend, mean: float, scale: float, layout: str) -> None:
    for case in cases(backend, layout, weight=torch.float32, eps=1e-60):
        case.put("input", (case.array("input") + mean) * scale)
        exact = case.batch_statistics()
        output, _, statistics = case.forward()
        assert_statistics(statistics, exact)
        weight = np.abs(case.array("weight")).max()
        want = reference.batch_norm(*case.defined(exact))
        assert np.abs(float64(output) - want).max() <= 2 * weight * NORMALIZED_ERROR[mean]
        case.assert_gradients(case.backward(None, statistics), exact)


@each_layout
@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-44])
def test_denormals(backend: Backend, scale: float, layout: str) -> None:
    last_place = 2 * 2.0**-149  # what float32 cannot resolve in the mean
    for case in cases(backend, layout, eps=1e-12):
        case.put("input", (case.array("input") + 3) * scale)
        exact = case.batch_statistics()
        output, _, statistics = case.forward()
        mean, var = (float64(part) for part in statistics[:-1].view(2, -1))
        np.testing.assert_allclose(mean, exact.mean, rtol=1e-6, atol=last_place)
        # Squares of denormals may be lost, since eps is far above them.
        np.testing.assert_allclose(var + case.eps, exact.var + case.eps, rtol=1e-15)
        want = reference.batch_norm(*case.defined(exact))
        allowed = 1e-6 * np.abs(want).max() + last_place / np.sqrt(case.eps)
        assert np.abs(float64(output) - want).max() <= allowed


@each_layout
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e8])
def test_float64(backend: Backend, mean: float, layout: str) -> None:
    for case in cases(backend, layout, dtype=torch.float64, mean=mean):
        exact = case.batch_statistics()
        output, _, statistics = case.forward()
        want = reference.batch_norm(*case.defined(exact))
        # The mean itself is exact to a unit in its last place.
        deviation = np.sqrt(exact.var.min() + case.eps)
        allowed = (1e-13 + 4 * np.spacing(mean)) / min(deviation, 1)
        assert np.abs(float64(output) - want).max() <= allowed * max(1, np.abs(want).max())
        grads = case.backward(None, statistics)
        wanted = reference.batch_norm_backward(case.array("grad_output"), *case.defined(exact))
        largest = max(1, np.abs(wanted.input).max())
        assert np.abs(float64(grads["input"]) - wanted.input).max() <= 4 * allowed * largest


@each_layout
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
@each_mean
@pytest.mark.parametrize("vectors", ["float32", "same"])
def test_half_precision_errs_at_most_as_torch(
    backend: Backend, vectors: str, mean: float, fusion: str, dtype: torch.dtype, layout: str
) -> None:
    kind = torch.float32 if vectors == "float32" else dtype
    options = {"dtype": dtype, "fusion": fusion, "weight": kind, "bias": kind, "mean": mean}
    for case in cases(backend, layout, SMALL, **options):
        exact = case.batch_statistics()
        case.keep_off_the_kink(exact)
        leaves = [
            None if tensor is None else tensor.detach().clone().requires_grad_()
            for tensor in (case["input"], case.tensors["residual"], *case.affine)
        ]
        x, residual, weight, bias = leaves
        assert x is not None
        by_torch = F.batch_norm(x, None, None, weight, bias, True, 0.1, case.eps)
        by_torch = by_torch if residual is None else by_torch + residual
        if case.ceiling is not None:
            by_torch = F.hardtanh(by_torch, 0.0, case.ceiling)
        by_torch.backward(case["grad_output"])

        output, mask, statistics = case.forward()
        arguments: Any = (*case.defined(exact), case.activation)
        want = reference.batch_norm(*arguments)
        assert_error_at_most_torch(output, by_torch, want)
        grads = case.backward(mask, statistics)
        wanted = reference.batch_norm_backward(case.array("grad_output"), *arguments)
        for name, leaf in zip(("input", "residual", "weight", "bias"), leaves, strict=True):
            if name in grads and leaf is not None and leaf.grad is not None:
                assert_error_at_most_torch(grads[name], leaf.grad, getattr(wanted, name))


@pytest.mark.parametrize("layout", ["first", "last"])
def test_variance_of_float64_far_from_zero(layout: str) -> None:
    """Compute variances far from 0; had units' means been rounded at 1e6, the variance would lose 4e-12."""
    x = np.random.default_rng(5).normal(size=(64, 3, 30, 30)) + 1e6
    tensor = torch.from_numpy(x)
    if layout == "last":
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    batch_norm(tensor, *running, training=True, momentum=1.0)
    exact = np.moveaxis(x, 1, 0).reshape(3, -1).astype(np.longdouble).var(axis=1, ddof=1)
    np.testing.assert_allclose(running[1], exact.astype(np.float64), rtol=2e-15)
