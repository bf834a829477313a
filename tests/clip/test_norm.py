"""get_total_norm: one ulp of float32, for every size, scale, dtype and layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steadygrad as sg
from steadygrad.reference import norm as reference
from tests.backends import Backend
from tests.optim.parameter_sets import like_layout
from tests.tolerances import TOLERANCES

SIZES = [0, 1, 31, 32, 33, 127, 128, 129, *range(4095, 4100), 8191, 8192, 8193]
LARGE_SIZES = [65535, 65536, 65537, 1_000_003]
SCALES = [1e-42, 1e-40, 1e-38, 1e-30, 1e-23, 1e-19, 1e-10, 1.0]
SCALES += [1e10, 1e18, 1e19, 1e20, 1e30, 1e36]
NORM_TYPES = [2.0, 1.0, math.inf, -math.inf, 0.0, 0.5, 3.0, 7.0]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
RTOL64 = TOLERANCES[torch.float64].rtol


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(size: int, scale: float, seed: int = 0) -> Tensor:
    """Return normally distributed float32 values, including denormal ones."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * scale).clamp(-3.4e38, 3.4e38).float()


def float64_norm(tensors: Sequence[Tensor]) -> float:
    """Return the 2-norm in float64; no square of a float32 leaves its range."""
    total = 0.0
    for tensor in tensors:
        for piece in tensor.detach().cpu().reshape(-1).split(1 << 20):
            values = piece.double().numpy()
            total += float(np.dot(values, values))
    return math.sqrt(total)


def assert_one_ulp(got: Tensor, want: float) -> None:
    """Assert that a 0-d float32 tensor is the float64 value or one of its neighbours."""
    assert got.dim() == 0 and got.dtype == torch.float32
    with np.errstate(over="ignore"):
        nearest = np.float32(want)
    if np.isinf(nearest):
        assert math.isinf(got.item())
    else:
        assert abs(got.item() - want) <= float(np.spacing(nearest)), (got.item(), want)


@pytest.mark.parametrize("size", SIZES + LARGE_SIZES)
def test_one_ulp_over_sizes_and_scales(backend: Backend, size: int) -> None:
    for scale in SCALES if size < 1_000_000 else SCALES[::3]:
        values = normal(size, scale, seed=size)
        assert_one_ulp(sg.get_total_norm([values.to(backend.device)]), float64_norm([values]))


@pytest.mark.full
def test_one_ulp_of_30_million_elements(backend: Backend) -> None:
    values = normal(30_000_000, 1e-3).to(backend.device)
    assert_one_ulp(sg.get_total_norm(values), float64_norm([values]))
    # This is the worst case of a float32 sum: equal terms that stop counting.
    values.fill_(3e-5)
    want = float(np.float32(3e-5)) * math.sqrt(30_000_000)
    assert_one_ulp(sg.get_total_norm(values), want)


@pytest.mark.parametrize("size", [33, 4099, 65537])
def test_one_ulp_where_elements_differ_by_many_decades(backend: Backend, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    exponents = torch.rand(size, generator=generator, dtype=torch.float64) * 82 - 44
    values = (10.0**exponents).float()
    assert_one_ulp(sg.get_total_norm([values.to(backend.device)]), float64_norm([values]))
    one_large = normal(size, 1e-30)
    one_large[size // 2] = 3e38
    assert_one_ulp(sg.get_total_norm([one_large.to(backend.device)]), float64_norm([one_large]))
    for fill in (1.4e-45, 1e-38, 3.4028234e38):
        same = torch.full((size,), fill)
        assert_one_ulp(sg.get_total_norm([same.to(backend.device)]), float64_norm([same]))


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e20])
def test_one_ulp_of_many_tensors(backend: Backend, scale: float) -> None:
    tensors = [normal((7 * i) % 67, scale, seed=i) for i in range(1500)]
    tensors += [normal(size, scale, seed=size) for size in (4099, 8193, 65537)]
    got = sg.get_total_norm([t.to(backend.device) for t in tensors])
    assert_one_ulp(got, float64_norm(tensors))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [0, 1, 31, 33, 4099, 65537])
def test_half_types_give_float32_to_one_ulp(
    backend: Backend, dtype: torch.dtype, size: int
) -> None:
    scales = [6e-8, 1e-5, 1.0, 1e4] if dtype == torch.float16 else [1e-40, 1e-20, 1.0, 1e20, 1e36]
    for scale in scales:
        values = normal(size, scale, seed=size).to(dtype)
        assert_one_ulp(sg.get_total_norm([values.to(backend.device)]), float64_norm([values]))


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-20, 1.0, 1e20, 1e200, 1e300])
@pytest.mark.parametrize("size", [1, 33, 4099, 65537])
def test_float64_neither_overflows_nor_underflows(
    backend: Backend, scale: float, size: int
) -> None:
    values = torch.randn(size, dtype=torch.float64).clamp(-5, 5) * scale
    got = sg.get_total_norm([values.to(backend.device)])
    assert got.dtype == torch.float64 and got.dim() == 0
    want = reference.total_norm([values.numpy()])
    assert 0 < want < math.inf
    assert got.item() == pytest.approx(want, rel=RTOL64, abs=0.0)


def test_a_mixed_list_is_float64_when_any_tensor_is(backend: Backend) -> None:
    device = backend.device
    parts = [normal(99, 2.0, seed=i).to(device) for i in range(4)]
    mixed = [parts[0].bfloat16(), parts[1].half(), parts[2], parts[3][:0]]
    got = sg.get_total_norm(mixed)
    assert_one_ulp(got, float64_norm(mixed))
    mixed.append(parts[3].double() * 1e200)
    got = sg.get_total_norm(mixed)
    assert got.dtype == torch.float64
    want = reference.total_norm([t.double().cpu().numpy() for t in mixed])
    assert got.item() == pytest.approx(want, rel=RTOL64, abs=0.0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_norm_type(backend: Backend, norm_type: float, dtype: torch.dtype) -> None:
    tensors = [normal(size, 3.0, seed=size).to(dtype) for size in (1, 33, 4099, 9001)]
    tensors[1][5:9] = 0.0
    tensors.append(torch.zeros(0, dtype=dtype))
    if norm_type < 0:
        tensors[1][5:9] = 0.25
    got = sg.get_total_norm([t.to(backend.device) for t in tensors], norm_type)
    want = reference.total_norm([t.double().numpy() for t in tensors], norm_type)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if norm_type in (0.0, math.inf, -math.inf):
        assert got.item() == want
    elif dtype == torch.float64:
        assert got.item() == pytest.approx(want, rel=RTOL64, abs=0.0)
    else:
        assert_one_ulp(got, want)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("norm_type", [1.0, 0.5, 3.0, 7.0])
def test_no_norm_type_overflows_or_underflows(
    backend: Backend, norm_type: float, scale: float
) -> None:
    values = normal(4099, scale)
    got = sg.get_total_norm([values.to(backend.device)], norm_type)
    want = reference.total_norm([values.numpy()], norm_type)
    assert want > 0
    assert_one_ulp(got, want)


def test_norm_type_is_converted_as_torch_does(backend: Backend) -> None:
    values = normal(50, 1.0).to(backend.device)
    assert sg.get_total_norm([values], "inf") == values.abs().max()  # type: ignore[arg-type]
    assert torch.equal(sg.get_total_norm([values], 2), sg.get_total_norm([values], 2.0))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_elements_give_what_torch_gives(
    backend: Backend, norm_type: float, dtype: torch.dtype
) -> None:
    for inserted in ([math.nan], [math.inf], [-math.inf], [math.nan, math.inf]):
        values = normal(300, 1.0).to(dtype)
        for place, element in enumerate(inserted):
            values[place * 290 + 7] = element
        got = sg.get_total_norm([values.to(backend.device)], norm_type).item()
        want = torch.nn.utils.get_total_norm([values], norm_type).item()
        assert got == want or (math.isnan(got) and math.isnan(want)), inserted


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_if_nonfinite_is_decided_from_the_elements(
    backend: Backend, dtype: torch.dtype
) -> None:
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype, device=backend.device)
    sg.get_total_norm([largest], error_if_nonfinite=True)
    for element in (math.nan, math.inf, -math.inf):
        bad = largest.clone()
        bad[999] = element
        with pytest.raises(RuntimeError, match="finite"):
            sg.get_total_norm([largest, bad], error_if_nonfinite=True)


@pytest.mark.parametrize("size", [33, 8193, 65537, 1_000_003])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
def test_same_bits_for_every_number_of_threads(
    backend: Backend, threads: None, size: int, norm_type: float
) -> None:
    tensors = [normal(n, 1.0, seed=n).to(backend.device) for n in (size, 5, size // 3, 4099)]
    results = []
    for count in (1, 2, 3, 1, 2):
        torch.set_num_threads(count)
        results.append(sg.get_total_norm(tensors, norm_type).item())
    assert len(set(results)) == 1, results


def test_same_bits_in_every_run(backend: Backend) -> None:
    tensors = [normal(size, 1.0).to(backend.device) for size in (70_001, 4099, 12)]
    assert len({sg.get_total_norm(tensors).item() for _ in range(30)}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", range(5))
def test_every_memory_layout(backend: Backend, dtype: torch.dtype, layout: int) -> None:
    shapes = [(), (0,), (257,), (64, 65), (3, 0, 5), (4, 6, 5, 7), (65, 3, 34)]
    tensors = []
    for shape in shapes:
        values = torch.randn(shape, dtype=torch.float64).to(dtype).to(backend.device)
        tensors.append(like_layout(values, layout))
    want = reference.total_norm([t.double().cpu().numpy() for t in tensors])
    got = sg.get_total_norm(tensors)
    if dtype == torch.float64:
        assert got.item() == pytest.approx(want, rel=RTOL64, abs=0.0)
    else:
        assert_one_ulp(got, want)


def test_expanded_tensors_count_every_logical_element(backend: Backend) -> None:
    row = normal(13, 1.0).to(backend.device)
    cases = [
        row.expand(5, 13),
        row[:1].expand(4099),
        row[0].expand(2, 3, 4),
        row[:, None].expand(13, 7),
    ]
    for expanded in cases:
        assert_one_ulp(sg.get_total_norm([expanded]), float64_norm([expanded.contiguous()]))


def test_a_tensor_a_list_a_tuple_and_a_generator(backend: Backend) -> None:
    tensors = [normal(size, 1.0).to(backend.device) for size in (3, 40)]
    want = sg.get_total_norm(tensors)
    assert torch.equal(sg.get_total_norm(tuple(tensors)), want)
    assert torch.equal(sg.get_total_norm(t for t in tensors), want)
    assert torch.equal(sg.get_total_norm(tensors[0]), sg.get_total_norm([tensors[0]]))
    assert torch.equal(sg.get_total_norm(tensors, foreach=True), want)
    assert torch.equal(sg.get_total_norm(tensors, foreach=False), want)


def test_nothing_has_norm_zero(backend: Backend) -> None:
    for nothing in ([], (), iter(()), [torch.zeros(0, device=backend.device)]):
        got = sg.get_total_norm(nothing)
        assert got.item() == 0.0 and got.dim() == 0 and got.dtype == torch.float32


def test_duplicates_count_once(backend: Backend) -> None:
    values = normal(40, 1.0).to(backend.device)
    other = normal(4, 1.0).to(backend.device)
    got = sg.get_total_norm([values, other, values])
    assert torch.equal(got, sg.get_total_norm([values, other]))


def test_complex_tensors_are_viewed_as_real(backend: Backend) -> None:
    for dtype in (torch.complex64, torch.complex128):
        values = torch.randn(65, dtype=dtype, device=backend.device)
        got = sg.get_total_norm([values])
        want = np.linalg.norm(values.cpu().numpy().astype(np.complex128))
        assert got.item() == pytest.approx(want, rel=TOLERANCES[got.dtype].rtol, abs=0.0)
        assert not got.is_complex()


def test_requires_grad_is_not_followed(backend: Backend) -> None:
    values = normal(40, 1.0).to(backend.device).requires_grad_()
    assert not sg.get_total_norm([values]).requires_grad
    assert not sg.get_total_norm([values * 2]).requires_grad


layouts = st.integers(0, 4)
shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4)
drawn_tensors = st.lists(
    st.tuples(shapes, st.sampled_from(DTYPES), layouts, st.integers(-5, 4), st.integers(0, 10_000)),
    max_size=8,
)


@given(drawn_tensors, st.sampled_from([2.0, 1.0, 3.0, 0.5, math.inf]))
def test_any_list_of_tensors(
    backend: Backend, drawn: list[tuple[list[int], torch.dtype, int, int, int]], norm_type: float
) -> None:
    tensors = []
    for shape, dtype, layout, decade, seed in drawn:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**decade
        tensors.append(like_layout(values.to(dtype).to(backend.device), layout))
    got = sg.get_total_norm(tensors, norm_type)
    doubles = [t.double().cpu() for t in tensors]
    want = reference.total_norm([t.numpy() for t in doubles], norm_type)
    assert got.dtype == (
        torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    )
    if got.dtype == torch.float32:
        assert_one_ulp(got, want)
    else:
        assert got.item() == pytest.approx(want, rel=RTOL64, abs=0.0)
    # torch is right in float64 within its range, but has no maximum of an empty tensor.
    full = [t for t in doubles if t.numel()]
    torchs = torch.nn.utils.get_total_norm(full, norm_type).item()
    assert got.item() == pytest.approx(torchs, rel=TOLERANCES[got.dtype].rtol, abs=0.0)


@pytest.mark.parametrize("p", [-1100.0, -60.0, 50.0, 1100.0, 1e5])
@pytest.mark.parametrize("scale", [1e-310, 1.0, 1e307])
def test_large_exponents_stay_in_range(backend: Backend, p: float, scale: float) -> None:
    tensors = [normal(300, 1.0, seed).double() * scale for seed in range(3)]
    want = reference.total_norm([t.numpy() for t in tensors], p)
    got = sg.get_total_norm([t.to(backend.device) for t in tensors], p).item()
    assert 0 < want < math.inf
    assert got == pytest.approx(want, rel=1e-12, abs=5e-323)


def test_small_exponents_whose_root_leaves_the_range(backend: Backend) -> None:
    tensor = torch.full((2000,), 1e-40, dtype=torch.float64)
    got = sg.get_total_norm([tensor.to(backend.device)], 0.01).item()
    assert got == pytest.approx(2000.0**50 * 1e-40 * 2000.0**50, rel=1e-10)


def test_flushed_denormals_do_not_depend_on_the_threads(backend: Backend, threads: None) -> None:
    tensor = torch.full((400_000,), 1e-310, dtype=torch.float64).to(backend.device)
    norms = set()
    assert torch.set_flush_denormal(True)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norms.add(tuple(sg.get_total_norm([tensor], p).cpu().numpy().tobytes() for p in (2, 3)))
    finally:
        torch.set_flush_denormal(False)
    assert len(norms) == 1


@pytest.mark.parametrize("p", [math.inf, -math.inf, 1.0, 2.0, 3.0])
def test_the_norm_of_minus_zero_is_zero(backend: Backend, p: float) -> None:
    norm = sg.get_total_norm([torch.tensor(-0.0, device=backend.device)], p)
    assert norm == 0 and not norm.signbit()
