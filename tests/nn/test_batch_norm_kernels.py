"""Batch norm kernels against their definition: every operation, layout, dtype and fusion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.nn.relu_mask import mask_size
from steadygrad.reference import batch_norm as reference
from steadygrad.reference.batch_norm import Statistics
from tests.backends import Backend
from tests.nn.batch_norm_calls import (
    DTYPES,
    FUSIONS,
    LAYOUTS,
    Case,
    assert_surroundings_unwritten,
    place,
)
from tests.tolerances import assert_close, assert_rounded, float64

# Dtypes of weight and bias: "same" is the input's, "other" is a different one.
AFFINE: dict[str, tuple[str | None, str | None]] = {
    "same": ("same", "same"),
    "other": ("other", "other"),
    "absent": (None, None),
    "weight": ("same", None),
    "bias": (None, "other"),
}
OTHER = {
    torch.float32: torch.bfloat16,
    torch.float64: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float64,
}
SHAPE = (3, 5, 3, 7)

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_fusion = pytest.mark.parametrize("fusion", FUSIONS)
each_affine = pytest.mark.parametrize("affine", AFFINE)


def vector_dtype(name: str | None, dtype: torch.dtype) -> torch.dtype | None:
    return {None: None, "same": dtype, "other": OTHER[dtype]}[name]


@pytest.fixture
def case(backend: Backend, layout: str, dtype: torch.dtype, fusion: str, affine: str) -> Case:
    weight, bias = (vector_dtype(name, dtype) for name in AFFINE[affine])
    return Case(SHAPE, backend.device, dtype, layout, fusion, weight, bias, eps=1e-3)


def counter(device: torch.device, value: int = 0) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=device)


def assert_statistics(got: Tensor, want: Statistics, dtype: torch.dtype) -> None:
    """Compare means relative to the deviation, variances relative to themselves, and counts exactly."""
    channels = want.mean.size
    deviation = np.sqrt(want.var)
    assert got.shape == (2 * channels + 1,)
    assert_rounded(got[:channels], want.mean, deviation + 1e-9 * np.abs(want.mean), dtype)
    assert_rounded(got[channels:-1], want.var, want.var, dtype)
    assert float(got[-1]) == want.count


@each_layout
@each_dtype
@each_fusion
@each_affine
def test_training(case: Case, dtype: torch.dtype) -> None:
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    output, mask, statistics = case.forward()
    assert_statistics(statistics, exact, dtype)
    case.assert_output(output, exact)
    case.assert_mask(mask, output, exact)
    case.assert_gradients(case.backward(mask, statistics), exact)


@each_layout
@each_dtype
@each_fusion
@each_affine
def test_inference(case: Case, dtype: torch.dtype) -> None:
    mean, var, exact = case.running(OTHER[dtype])
    case.keep_off_the_kink(exact)
    output, mask = case.normalize(None, mean, var)
    case.assert_output(output, exact)
    case.assert_mask(mask, output, exact)
    case.assert_gradients(case.backward(mask, None, mean, var), exact, constant=True)


@each_layout
@each_dtype
@each_fusion
@each_affine
def test_pieces_of_training_are_the_whole(case: Case, dtype: torch.dtype) -> None:
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    statistics = case.statistics()
    assert_statistics(statistics, exact, dtype)
    output, mask = case.normalize(statistics)
    case.assert_output(output, exact)
    case.assert_mask(mask, output, exact)
    sums = case.backward_sums(mask, statistics)
    case.assert_gradients(case.backward_input(mask, statistics, sums), exact)
    half = sums.numel() // 2
    of_weight = sums[half:] / torch.sqrt(statistics[half:-1] + case.eps)
    case.assert_gradients({"bias": sums[:half], "weight": of_weight}, exact)


@each_layout
@each_dtype
@pytest.mark.parametrize("fusion", ["bn", "add+relu", "add+relu6"])
def test_each_gradient_alone_has_the_same_bits(
    backend: Backend, layout: str, dtype: torch.dtype, fusion: str
) -> None:
    case = Case(SHAPE, backend.device, dtype, layout, fusion, dtype, dtype)
    _, mask, statistics = case.forward()
    everything = case.backward(mask, statistics)
    for name, together in everything.items():
        alone = case.gradients()[name]
        destinations: list[Any] = [None] * 4
        destinations[("input", "residual", "weight", "bias").index(name)] = alone
        _kernels.batch_norm_backward(
            case["grad_output"],
            case["input"],
            mask,
            *case.affine,
            statistics,
            None,
            None,
            case.eps,
            case.ceiling,
            *destinations,
            case.allocate,
        )
        assert torch.equal(alone, together), name


@each_dtype
@each_layout
@pytest.mark.parametrize("shares", [(4, 2, 1), (7, 0), (0, 3, 4), (1, 1, 1, 1, 1, 1, 1)], ids=str)
def test_parts_of_a_batch_equal_the_whole(
    backend: Backend, shares: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    whole = Case((7, 5, 4, 3), backend.device, dtype, layout, "add+relu", dtype, mean=3.0)
    exact = whole.batch_statistics()
    whole.keep_off_the_kink(exact)
    ends = np.cumsum(shares)
    parts = [whole_part(whole, end - n, end) for n, end in zip(shares, ends, strict=True) if n]

    # A part without elements is not read, whatever it contains.
    rows = [part.statistics() for part in parts]
    empty = torch.full_like(rows[0], torch.nan)
    empty[-1] = 0
    found = iter(rows)
    gathered = torch.stack([next(found) if n else empty for n in shares])
    statistics, mean, var, _ = combine(whole, gathered, 0.3)
    assert_statistics(statistics, exact, dtype)
    running = reference.update_running_statistics(np.zeros(5), np.ones(5), exact, 0.3)
    assert_close(mean, running[0], torch.float32)
    assert_close(var, running[1], torch.float32)

    outputs = [part.normalize(statistics) for part in parts]
    whole.assert_output(torch.cat([output for output, _ in outputs]), exact)
    masks = [mask for _, mask in outputs]
    sums = sum(p.backward_sums(mask, statistics) for p, mask in zip(parts, masks, strict=True))
    assert isinstance(sums, Tensor)
    grads = [p.backward_input(m, statistics, sums) for p, m in zip(parts, masks, strict=True)]
    names = ("input", "residual")
    together = {name: torch.cat([grad[name] for grad in grads]) for name in names}
    whole.assert_gradients(together, exact)


def whole_part(whole: Case, start: int, end: int) -> Case:
    """Return the same case for some of its samples."""
    shape = (end - start, *whole.shape[1:])
    part = Case(shape, whole.device, whole.dtype, whole.layout, whole.fusion, whole.weight)
    for name in ("input", "residual", "grad_output"):
        part.put(name, whole.array(name)[start:end])
    for name in ("weight", "bias"):
        part.tensors[name] = whole.tensors[name]
    return part


def combine(
    case: Case, parts: Tensor, momentum: float | None, batches: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return combined statistics, running mean and variance, and the number of batches."""
    statistics = case.vector(parts.shape[1])
    mean = place(np.zeros(case.channels), torch.float32, case.device)
    var = place(np.ones(case.channels), torch.float32, case.device)
    assert mean is not None and var is not None
    tracked = counter(case.device, batches)
    _kernels.batch_norm_combine(parts, statistics, mean, var, tracked, momentum)
    assert_surroundings_unwritten(statistics)
    return statistics, mean, var, tracked


@pytest.mark.parametrize("counts", [(30.0,), (30.0, 1.0, 7.0), (0.0, 3.0, 0.0, 9.0)], ids=str)
def test_combined_statistics_to_the_bit(backend: Backend, counts: tuple[float, ...]) -> None:
    """Parts are added in their order, without a division for each; one part alone stays what it is."""
    case = Case((4, 3, 5), backend.device)
    rows = np.random.default_rng(0).normal(3.0, 1.0, (len(counts), 7)) ** 2
    rows[:, -1] = counts
    part = case.vector(rows.size).view(rows.shape)
    part.copy_(torch.from_numpy(rows))
    got = combine(case, part, 0.1)[0].cpu().numpy()
    total = sum(counts)
    for c in range(3):
        mean = squares = 0.0
        for row, count in zip(rows, counts, strict=True):
            mean += row[c] * count
        mean /= total
        for row, count in zip(rows, counts, strict=True):
            delta = row[c] - mean
            squares += row[3 + c] * count + delta * delta * count if count else 0.0
        want = (mean, squares / total) if len(counts) > 1 else (rows[0, c], rows[0, 3 + c])
        assert (got[c], got[3 + c]) == want
    assert got[6] == total


@each_dtype
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_running_statistics(
    backend: Backend, dtype: torch.dtype, momentum: float | None, kind: torch.dtype
) -> None:
    mean, var = (place(np.full(67, v), kind, backend.device) for v in (0.5, 2.0))
    assert mean is not None and var is not None
    batches = counter(backend.device, 4)
    for number in (5, 6):
        case = Case((5, 67, 3), backend.device, dtype, seed=number, mean=2.0)
        before = float64(mean).copy(), float64(var).copy()
        versions = [tensor._version for tensor in (mean, var, batches)]
        case.forward(mean, var, batches, momentum)
        want = reference.update_running_statistics(
            *before, case.batch_statistics(), momentum, number
        )
        assert_rounded(mean, want[0], np.abs(want[0]) + np.abs(before[0]), dtype)
        assert_rounded(var, want[1], np.abs(want[1]) + np.abs(before[1]), dtype)
        assert int(batches) == number
        for tensor, version in zip((mean, var, batches), versions, strict=True):
            assert tensor._version > version


@pytest.mark.parametrize("channels", [1, 130])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_counted_once(backend: Backend, channels: int, layout: str) -> None:
    case = Case((40, channels, 5), backend.device, layout=layout)
    batches = counter(backend.device, 2**40)
    case.forward(None, None, batches, 0.1)
    assert int(batches) == 2**40 + 1
    rows = case.statistics().expand(3, -1).contiguous()
    assert int(combine(case, rows, 0.1, 7)[3]) == 8


@pytest.mark.parametrize("start", [0, 1, 9])
def test_cumulative_factor(backend: Backend, start: int) -> None:
    case = Case((6, 3, 4), backend.device, mean=5.0)
    exact = case.batch_statistics()
    want = reference.update_running_statistics(np.zeros(3), np.ones(3), exact, None, start + 1)
    mean, var = torch.zeros(3, device=case.device), torch.ones(3, device=case.device)
    case.forward(mean, var, counter(case.device, start), None)
    combined = combine(case, case.statistics()[None].contiguous(), None, start)
    for got in ((mean, var), combined[1:3]):
        assert_close(got[0], want[0], torch.float32)
        assert_close(got[1], want[1], torch.float32)


def test_running_statistics_may_be_absent(backend: Backend) -> None:
    case = Case((6, 3, 4), backend.device, mean=5.0)
    exact = case.batch_statistics()
    output, _, statistics = case.forward(None, None, None, 0.1)
    case.assert_output(output, exact)
    assert_statistics(statistics, exact, torch.float32)


@each_layout
@each_dtype
@pytest.mark.parametrize("fusion", ["relu", "relu6"])
def test_relu_is_found_again_as_it_was(
    backend: Backend, fusion: str, layout: str, dtype: torch.dtype
) -> None:
    """Count the elements that passed ReLU, at its bounds or not, by the gradient of the bias."""
    case = Case((9, 7, 11, 5), backend.device, dtype, layout, fusion, torch.float32, torch.float32)
    case.put("grad_output", np.ones(case.shape))
    output, mask, statistics = case.forward()
    assert mask is None
    mask = case.vector(mask_size(output), torch.uint8)
    _kernels.batch_norm_normalize(
        case["input"],
        None,
        *case.affine,
        *(statistics, None, None),
        case.eps,
        case.ceiling,
        case.empty(),
        mask,
    )
    passed = case.passed(mask)
    got = float64(case.backward(None, statistics)["bias"])
    np.testing.assert_array_equal(got, passed.sum(axis=(0, 2, 3)))
    if fusion == "relu":  # 6 may also be what an element below it was rounded to
        np.testing.assert_array_equal(passed, float64(output) > 0)


@each_layout
@each_dtype
def test_mask_has_the_bits_of_the_output(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    case = Case((9, 7, 11, 5), backend.device, dtype, layout, "add+relu")
    case.put("grad_output", np.ones(case.shape))
    output, mask, statistics = case.forward()
    grads = case.backward(mask, statistics)
    assert torch.equal(grads["residual"] > 0, output > 0)
    assert torch.equal(grads["bias"].long(), (output > 0).sum(dim=(0, 2, 3)))


@each_layout
@pytest.mark.parametrize("shape", [(3, 5, 3, 7), (6, 3, 5, 5), (2, 3, 4, 4), (33, 3), (2, 20, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_every_byte_of_a_mask_is_written(
    backend: Backend, shape: tuple[int, ...], layout: str, training: bool
) -> None:
    """Compare masks of equal calls, also where a row fills its last byte only in part."""
    case = Case(shape, backend.device, layout=layout, fusion="add+relu")
    statistics = case.statistics()
    masks = []
    for byte in (0, 255):
        mask = torch.full((mask_size(case["input"]),), byte, dtype=torch.uint8).to(backend.device)
        operands = (case["input"], case["residual"], *case.affine)
        if training:
            tracked = (None, None, None, 0.1)
            _kernels.batch_norm_forward(
                *operands,
                *tracked,
                case.eps,
                case.ceiling,
                case.empty(),
                mask,
                statistics,
                case.allocate,
            )
        else:
            given = (statistics, None, None)
            _kernels.batch_norm_normalize(
                *operands, *given, case.eps, case.ceiling, case.empty(), mask
            )
        masks.append(mask)
    assert torch.equal(*masks)
