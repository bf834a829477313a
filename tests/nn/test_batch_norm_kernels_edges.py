"""Batch norm kernels at the edges: sizes, alignment, threads, and numbers that are hard to add."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steadygrad.reference import batch_norm as reference
from tests.backends import Backend
from tests.nn.batch_norm_calls import DTYPES, FUSIONS, LAYOUTS, Case, Shape
from tests.tolerances import float64

CHANNELS = [1, 2, 3, 7, 8, 16, 31, 64, 65, 130]
INNER: list[Shape] = [(), (1,), (2,), (7,), (8,), (3, 3), (7, 7), (63,), (8, 8), (65,), (17, 241)]
OUTER = [1, 2, 3, 33]
# Some channels are split over threads or blocks, and others share one. Threads share 2^17 elements or more, and planes
# are cut into pieces of 2^15.
LARGE: list[Shape] = [
    (7, 1, 20011),
    (2, 2, 110, 303),
    (1, 2, 70001),
    (27, 3, 40, 41),
    (3301, 40),
    (45_003, 3),
    (1, 4, 33_000),
    (2, 300, 9, 5),
    (4, 2048, 3),
    (21, 130, 7, 7),
    (87, 517, 3, 1),
    (3, 17, 5, 6, 7),
    (2, 5, 1, 9, 2, 3),
]

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_fusion = pytest.mark.parametrize("fusion", FUSIONS)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def most_elements(backend: Backend) -> int:
    """Return the largest number of elements of one of many shapes that is fast enough on the backend."""
    return {"emulated": 5_000}.get(backend.name, 50_000)


def assert_training(case: Case) -> None:
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    output, mask, statistics = case.forward()
    case.assert_output(output, exact)
    case.assert_mask(mask, output, exact)
    case.assert_gradients(case.backward(mask, statistics), exact)


def assert_inference(case: Case) -> None:
    mean, var, exact = case.running()
    case.keep_off_the_kink(exact)
    output, mask = case.normalize(None, mean, var)
    case.assert_output(output, exact)
    case.assert_mask(mask, output, exact)
    case.assert_gradients(case.backward(mask, None, mean, var), exact, constant=True)


def training_bits(case: Case) -> dict[str, Tensor]:
    """Return the bits of everything that training and inference, whole and in pieces, leave behind."""
    mean, var, _ = case.running()
    evaluated, evaluated_mask = case.normalize(None, mean, var)
    frozen = case.backward(evaluated_mask, None, mean, var)
    output, mask, statistics = case.forward(mean, var)
    sums = case.backward_sums(mask, statistics)
    pieces = case.backward_input(mask, statistics, sums)
    results = {"output": output, "statistics": statistics, "sums": sums, "mean": mean, "var": var}
    results |= {"evaluated": evaluated} | ({} if mask is None else {"mask": mask})
    results |= {f"grad_{name}": grad for name, grad in case.backward(mask, statistics).items()}
    results |= {f"pieces_{name}": grad for name, grad in pieces.items()}
    return results | {f"frozen_{name}": grad for name, grad in frozen.items()}


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, tensor in want.items():
        assert bits(got[name]) == bits(tensor), name


def bits(tensor: Tensor) -> bytes:
    if tensor.is_floating_point():  # a NaN made by a GPU has other bits than one made by a CPU
        tensor = tensor.masked_fill(tensor.isnan(), math.nan)
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


# --- sizes ---


@each_layout
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.full
def test_sizes(backend: Backend, channels: int, layout: str) -> None:
    kinds = [(torch.float32, "add+relu"), (torch.bfloat16, "relu"), (torch.float16, "add")]
    kinds += [(torch.float64, "bn"), (torch.bfloat16, "add+relu"), (torch.float32, "relu")]
    number = 0
    for outer, inner in product(OUTER, INNER):
        shape = (outer, channels, *inner)
        if math.prod(shape) > most_elements(backend):
            continue
        dtype, fusion = kinds[number % len(kinds)]
        number += 1
        if outer * math.prod(inner) > 1:
            assert_training(Case(shape, backend.device, dtype, layout, fusion, seed=number))
        assert_inference(Case(shape, backend.device, dtype, layout, fusion, seed=number))
    assert number >= 20


@each_layout
@pytest.mark.parametrize(
    ("dtype", "fusion"), [(torch.float32, "add+relu"), (torch.bfloat16, "relu")]
)
@pytest.mark.slow
def test_channels_split_and_shared(
    backend: Backend, dtype: torch.dtype, fusion: str, layout: str
) -> None:
    for shape in LARGE:
        assert_training(Case(shape, backend.device, dtype, layout, fusion, mean=1.0))


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 8, 13])
@each_dtype
@each_layout
def test_any_alignment(backend: Backend, layout: str, dtype: torch.dtype, offset: int) -> None:
    for shape in [(3, 16, 5, 8), (2, 64, 4), (9, 32)]:
        assert_training(Case(shape, backend.device, dtype, layout, "add+relu", offset=offset))
        assert_inference(Case(shape, backend.device, dtype, layout, "relu", offset=offset))


@pytest.mark.parametrize("name", ["input", "residual", "grad_output"])
@each_layout
def test_one_tensor_out_of_line(backend: Backend, layout: str, name: str) -> None:
    """Misalign one tensor while its neighbours are aligned."""
    case = Case((4, 16, 6, 4), backend.device, torch.bfloat16, layout, "add+relu", offset=0)
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    case.offset = 3
    case.put(name, case.values[name])
    case.offset = 0
    output, mask, statistics = case.forward()
    case.assert_output(output, exact)
    case.assert_gradients(case.backward(mask, statistics), exact)


@given(
    shape=st.tuples(
        st.integers(1, 9), st.integers(1, 40), st.lists(st.integers(1, 9), max_size=3).map(tuple)
    ).map(lambda drawn: (drawn[0], drawn[1], *drawn[2])),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    fusion=st.sampled_from(list(FUSIONS)),
    affine=st.tuples(*[st.sampled_from([None, *DTYPES])] * 2),
    offset=st.integers(0, 17),
    seed=st.integers(0, 99),
)
@settings(max_examples=120)
def test_any_shape(
    backend: Backend,
    shape: Shape,
    layout: str,
    dtype: torch.dtype,
    fusion: str,
    affine: tuple[torch.dtype | None, torch.dtype | None],
    offset: int,
    seed: int,
) -> None:
    if math.prod(shape) > most_elements(backend):
        shape = shape[:3]
    options = (backend.device, dtype, layout, fusion, *affine)
    assert_inference(Case(shape, *options, offset=offset, seed=seed))
    if math.prod(shape) > shape[1]:
        # Without eps, two elements may be so close that their gradient is nothing but rounding.
        assert_training(Case(shape, *options, eps=0.1, offset=offset, seed=seed))


# --- the same bits ---


@pytest.mark.once
@pytest.mark.usefixtures("threads")
@each_layout
@each_dtype
@pytest.mark.full
def test_same_bits_for_every_number_of_threads(
    backend: Backend, layout: str, dtype: torch.dtype
) -> None:
    # Threads share 2^17 elements or more.
    shapes = [(33, 130), (9, 3, 5001), (7, 70, 17, 17), (22_001, 6), (1, 4, 33_001)]
    for shape, fusion in zip(shapes, [*FUSIONS, *FUSIONS], strict=False):
        want: dict[str, Tensor] = {}
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            got = training_bits(Case(shape, backend.device, dtype, layout, fusion))
            want = want or got
            assert_same_bits(got, want)


# --- numbers ---


@each_layout
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fusion", ["bn", "relu", "relu6", "add+relu", "add+relu6"])
def test_nonfinite_elements_stay_in_their_channel(
    backend: Backend, fusion: str, dtype: torch.dtype, value: float, layout: str
) -> None:
    def results(name: str, element: float) -> tuple[Case, dict[str, Tensor]]:
        case = Case((3, 19, 5, 4), backend.device, dtype, layout, fusion)
        values = case.array(name)
        values[2, 7, 1, 3] = element
        case.put(name, values)
        return case, training_bits(case)

    others = [channel for channel in range(19) if channel != 7]
    for name in ("input", "grad_output"):
        want = results(name, 1.0)[1]
        case, got = results(name, value)
        for key in want:
            if key == "mask":
                continue
            pair = [r[key] if r[key].dim() > 1 else per_channel(r[key]) for r in (got, want)]
            assert bits(pair[0][:, others]) == bits(pair[1][:, others]), key
        exact = case.batch_statistics()
        if name == "input":
            assert got["output"][:, 7].isnan().all()
            # The running statistics of that channel stay as they are.
            mean, var, _ = case.running()
            assert got["mean"][7] == mean[7] and got["var"][7] == var[7]
        else:
            case.assert_output(got["output"], exact)


def per_channel(vector: Tensor) -> Tensor:
    """Return statistics without their count, sums, or one number per channel, as (numbers, channels)."""
    return vector[: vector.numel() // 19 * 19].view(-1, 19)


@each_layout
@each_dtype
@each_fusion
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_nonfinite_elements_in_inference(
    backend: Backend, value: float, fusion: str, dtype: torch.dtype, layout: str
) -> None:
    """Check that one element alone is affected; ReLU lets NaN through, and its gradient."""
    case = Case((3, 19, 5, 4), backend.device, dtype, layout, fusion, dtype, dtype)
    mean, var, exact = case.running()
    case.keep_off_the_kink(exact)
    values = case.array("input")
    values[2, 7, 1, 3] = values[0, 8, 0, 0] = value
    case.put("input", values)
    assert float(case["weight"][7]) * float(case["weight"][8]) != 0
    output, mask = case.normalize(None, mean, var)
    want = reference.batch_norm(*case.defined(exact), case.activation)
    np.testing.assert_array_equal(np.isnan(float64(output)), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(float64(output)), np.isinf(want))
    grads = case.backward(mask, None, mean, var)
    wanted = reference.batch_norm_backward(
        case.array("grad_output"), *case.defined(exact), case.activation, True
    )
    for name in ("input", "residual"):
        if name in grads:
            error = np.abs(float64(grads[name]) - getattr(wanted, name))
            assert error.max() < 0.1, name


@each_layout
@each_dtype
@pytest.mark.parametrize("fusion", ["relu", "relu6", "add+relu", "add+relu6"])
def test_bounds_of_relu(backend: Backend, fusion: str, dtype: torch.dtype, layout: str) -> None:
    """Compare with torch at 0 and 6, next to them and where an element is not finite; NaN lets its gradient through.

    torch lets it through on a GPU, and on a CPU for elements that it does not vectorise.
    """
    case = Case((6, 13, 7), backend.device, dtype, layout, fusion, None, None, eps=0.0)
    numbers = torch.finfo(dtype)
    values = [0.0, -0.0, numbers.tiny, -numbers.tiny, 3.0, -3.0, 7.0, numbers.max]
    values += [6.0, 6 - 4 * numbers.eps, 6 + 4 * numbers.eps, math.inf, -math.inf, math.nan]
    case.put("input", np.resize(values, case.shape))
    case.put("residual", np.zeros(case.shape) if case.added else None)
    case.put("grad_output", np.ones(case.shape))
    zeros, ones = (torch.full((13,), v, dtype=dtype, device=backend.device) for v in (0.0, 1.0))
    output, mask = case.normalize(None, zeros, ones)
    before = case["input"].clone().requires_grad_()
    want = F.relu(before) if case.activation == "relu" else F.relu6(before)
    want.backward(case["grad_output"])
    assert before.grad is not None
    grad = torch.where(before.isnan(), 1.0, before.grad)
    torch.testing.assert_close(output, want.detach(), rtol=0, atol=0, equal_nan=True)
    got = case.backward(mask, None, zeros, ones)
    for name in ("input", "residual") if case.added else ("input",):
        assert torch.equal(got[name], grad.to(dtype)), name


@each_layout
@each_dtype
@pytest.mark.parametrize("fusion", ["relu", "relu6", "add+relu", "add+relu6"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_relu_cut_off_is_not_looked_at(
    backend: Backend, value: float, fusion: str, dtype: torch.dtype, layout: str
) -> None:
    case = Case((3, 5, 6, 7), backend.device, dtype, layout, fusion)
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    _, mask, statistics = case.forward()
    before = reference.batch_norm(*case.defined(exact))
    assert case.ceiling is not None
    is_cut = (before < -1e-3) | (before > case.ceiling + 1e-3)
    case.put("grad_output", np.where(is_cut, 0.0, case.array("grad_output")))
    want = case.backward(mask, statistics)
    case.put("grad_output", np.where(is_cut, value, case.array("grad_output")))
    assert_same_bits(case.backward(mask, statistics), want)


@each_layout
@each_dtype
@pytest.mark.parametrize("value", [0.0, 0.1, -1000 / 3, 6e4])
def test_constant_channel_gives_the_bias(
    backend: Backend, value: float, dtype: torch.dtype, layout: str
) -> None:
    for shape in [(3, 5, 9, 11), (33, 5), (2, 5, 1)]:
        case = Case(shape, backend.device, dtype, layout, weight=dtype, bias=dtype)
        case.put("input", np.full(shape, value))
        output, _, statistics = case.forward()
        constant = float(case["input"].flatten()[0])
        assert statistics[:5].tolist() == [constant] * 5
        assert statistics[5:10].tolist() == [0.0] * 5
        bias = case["bias"].view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
        assert torch.equal(output, bias)
        grads = case.backward(None, statistics)
        case.assert_gradients(grads, case.batch_statistics())
        assert torch.equal(grads["weight"], torch.zeros_like(grads["weight"]))
