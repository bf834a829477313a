"""clip_grad_norm_, clip_grads_with_norm_, clip_grad_value_: torch's results without its gaps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_

import steadygrad as sg
from steadygrad.reference import clip as reference
from tests.backends import Backend
from tests.optim.parameter_sets import (
    gradient_sequence,
    like_layout,
    mixed_parameters,
    with_gradients,
)
from tests.snapshots import Snapshot, assert_refused, bits, same_bits
from tests.tolerances import TOLERANCES, assert_close, assert_error_at_most_twice_torch

FULL = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*FULL, *HALVES]


def pair(
    dtype: torch.dtype, backend: Backend, scale: float = 1.0
) -> tuple[list[Parameter], list[Parameter]]:
    """Return two equal lists of parameters with gradients of every layout, one of them None."""
    like = mixed_parameters(dtype, backend.device)
    (gradients,) = gradient_sequence(like, 1, decades=0)
    for gradient in gradients:
        assert gradient is not None
        gradient.mul_(scale)
    mine = with_gradients([g for g in gradients if g is not None])
    theirs = with_gradients([p.grad.clone() for p in mine if p.grad is not None])
    mine[4].grad = theirs[4].grad = None
    return mine, theirs


def grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def versions(params: Sequence[Tensor]) -> list[int]:
    return [g._version for g in grads(params)]


def as_vector(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in grads(params)])


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("dtype", FULL)
def test_equals_torch(
    backend: Backend, dtype: torch.dtype, norm_type: float, foreach: bool | None
) -> None:
    for scale, max_norm in ((1e-3, 1.0), (1.0, 1.0), (1e3, 0.37), (1e3, 1e9), (1.0, 0.0)):
        mine, theirs = pair(dtype, backend, scale)
        if norm_type == math.inf:  # torch has no maximum of an empty tensor
            mine = [p for p in mine if p.numel()]
            theirs = [p for p in theirs if p.numel()]
        got = sg.clip_grad_norm_(mine, max_norm, norm_type, foreach=foreach)
        want = clip_grad_norm_(theirs, max_norm, norm_type, foreach=foreach)
        assert got.dim() == 0 and got.dtype == want.dtype
        assert_close(got, want, dtype)
        for ours, torchs in zip(grads(mine), grads(theirs), strict=True):
            assert_close(ours, torchs, dtype)
        assert len(grads(mine)) == len(mine) - 1


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_types_are_as_exact_as_torch(
    backend: Backend, dtype: torch.dtype, norm_type: float
) -> None:
    mine, theirs = pair(dtype, backend, 30.0)
    mine, theirs = ([p for p in params if p.numel()] for params in (mine, theirs))
    exact, norm = reference.clip_grad_norm(
        [g.double().cpu().numpy() for g in grads(mine)], 1.0, norm_type
    )
    got = sg.clip_grad_norm_(mine, 1.0, norm_type)
    clip_grad_norm_(theirs, 1.0, norm_type)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(norm, rel=2.0**-23, abs=0.0)
    for ours, torchs, want in zip(grads(mine), grads(theirs), exact, strict=True):
        assert_error_at_most_twice_torch(ours, torchs, want)


@pytest.mark.parametrize("norm_type", [0.0, 0.5, 2.0, -math.inf])
def test_equals_the_reference_for_other_norm_types(backend: Backend, norm_type: float) -> None:
    mine, _ = pair(torch.float64, backend)
    before = [g.cpu().numpy().copy() for g in grads(mine)]
    want, norm = reference.clip_grad_norm(before, 1e-3, norm_type)
    got = sg.clip_grad_norm_(mine, 1e-3, norm_type)
    assert_close(got, norm, torch.float64)
    for ours, expected in zip(grads(mine), want, strict=True):
        assert_close(ours, expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [1e4, math.inf])
def test_an_inactive_clip_writes_nothing(
    backend: Backend, dtype: torch.dtype, max_norm: float
) -> None:
    params, _ = pair(dtype, backend)
    snapshot, before = Snapshot(params), versions(params)
    norm = sg.clip_grad_norm_(params, max_norm)
    assert 1.0 < norm.item() < 1e4
    snapshot.assert_unchanged()
    # If the device decides, the host announces everything that may be written.
    announced = backend.asynchronous and max_norm < math.inf
    assert versions(params) == before or announced
    sg.clip_grads_with_norm_(params, max_norm, norm)
    snapshot.assert_unchanged()
    assert versions(params) == before or announced


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_active_clip_bumps_the_versions_of_what_it_wrote(
    backend: Backend, dtype: torch.dtype
) -> None:
    for call in (
        lambda params: sg.clip_grad_norm_(params, 0.1),
        lambda params: sg.clip_grads_with_norm_(params, 0.1, torch.tensor(50.0)),
        lambda params: sg.clip_grad_value_(params, 0.01),
    ):
        params, _ = pair(dtype, backend)
        before = versions(params)
        call(params)
        for gradient, version in zip(grads(params), before, strict=True):
            assert gradient._version > version or gradient.numel() == 0


def test_a_used_then_clipped_gradient_raises_in_backward(backend: Backend) -> None:
    weight = torch.ones(5, device=backend.device, requires_grad=True)
    param = Parameter(torch.zeros(5, device=backend.device))
    param.grad = torch.full((5,), 100.0, device=backend.device)
    product = (weight * param.grad).sum()
    sg.clip_grad_norm_([param], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("size", [4, 4099])
@pytest.mark.parametrize("element", [3e19, 1e25, 3e38])
def test_huge_gradients_keep_their_direction(backend: Backend, element: float, size: int) -> None:
    values = torch.randn(size, device=backend.device).sign() * element
    (param,) = with_gradients([values.clone()])
    norm = sg.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
    want_norm = float(torch.tensor(element)) * math.sqrt(size)
    if want_norm < 3.4e38:
        assert norm.item() == pytest.approx(want_norm, rel=2.0**-23, abs=0.0)
    assert param.grad is not None
    assert_close(param.grad, values.double() / want_norm, torch.float32)
    assert not torch.isnan(norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_beyond_float32_is_clipped_right(backend: Backend, dtype: torch.dtype) -> None:
    params = with_gradients(
        [torch.full((1000,), 3e38, dtype=dtype, device=backend.device) for _ in range(3)]
    )
    sg.clip_grad_norm_(params, 2.0, error_if_nonfinite=True)
    total = as_vector(params).double().norm().item()
    rtol = TOLERANCES[torch.float32].rtol if dtype == torch.float32 else 2.0**-8
    assert total == pytest.approx(2.0, rel=rtol, abs=0.0)


def test_tiny_gradients_are_left_alone(backend: Backend) -> None:
    params = with_gradients([torch.full((33,), 1e-42, device=backend.device)])
    snapshot = Snapshot(params)
    norm = sg.clip_grad_norm_(params, 1.0)
    assert norm.item() == pytest.approx(float(torch.tensor(1e-42)) * math.sqrt(33), abs=1.5e-45)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inserted", [[math.nan], [math.inf], [-math.inf, math.inf], [1, math.nan]])
def test_non_finite_gradients_propagate_as_in_torch(
    backend: Backend, dtype: torch.dtype, inserted: list[float]
) -> None:
    mine, theirs = pair(dtype, backend)
    for params in (mine, theirs):
        gradient = params[6].grad
        assert gradient is not None
        gradient[3 : 3 + len(inserted)] = torch.tensor(inserted, dtype=dtype)
    got, want = sg.clip_grad_norm_(mine, 1.0), clip_grad_norm_(theirs, 1.0)
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    assert torch.equal(torch.isinf(got), torch.isinf(want))
    for ours, torchs in zip(grads(mine), grads(theirs), strict=True):
        assert torch.equal(ours.nan_to_num(7.0, 8.0, 9.0), torchs.nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", [math.nan, math.inf, -math.inf])
def test_error_if_nonfinite_leaves_the_gradients_alone(
    backend: Backend, dtype: torch.dtype, element: float
) -> None:
    params, _ = pair(dtype, backend, 100.0)
    last = grads(params)[-1]
    last[-1] = element
    snapshot, before = Snapshot(params), versions(params)
    with pytest.raises(RuntimeError, match="finite"):
        sg.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    snapshot.assert_unchanged()
    assert versions(params) == before or backend.asynchronous


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.nan, -1e-300])
def test_negative_and_nan_limits_are_refused(backend: Backend, value: float) -> None:
    params, _ = pair(torch.float32, backend)
    snapshot, got = Snapshot(params), str(value)[:2]
    expected = "non-negative|nonnegative|>= ?0|at least 0|not negative"
    for function, argument in (
        ("clip_grad_norm_", "max_norm"),
        ("clip_grads_with_norm_", "max_norm"),
        ("clip_grad_value_", "clip_value"),
    ):
        arguments = (torch.tensor(9.0),) if function == "clip_grads_with_norm_" else ()
        assert_refused(
            lambda name=function, rest=arguments: getattr(sg, name)(params, value, *rest),
            ValueError,
            function=function,
            argument=argument,
            expected=expected,
            got=got,
            unchanged=[snapshot],
        )


@pytest.mark.parametrize("function", ["clip_grad_norm_", "get_total_norm"])
def test_a_nan_norm_type_is_refused(backend: Backend, function: str) -> None:
    params, _ = pair(torch.float32, backend, 100.0)
    snapshot = Snapshot(params)
    arguments = (params, 1.0) if function == "clip_grad_norm_" else (grads(params),)
    assert_refused(
        lambda: getattr(sg, function)(*arguments, norm_type=math.nan),
        ValueError,
        function=function,
        argument="norm_type",
        expected="number",
        got="nan",
        unchanged=[snapshot],
    )


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", FULL)
def test_clip_grads_with_norm_equals_torch(
    backend: Backend, dtype: torch.dtype, foreach: bool | None
) -> None:
    for max_norm, total in ((1.0, 5.0), (1.0, 0.5), (0.0, 3.0), (1.0, math.nan), (1.0, math.inf)):
        mine, theirs = pair(dtype, backend)
        norm = torch.tensor(total, dtype=dtype, device=backend.device)
        assert sg.clip_grads_with_norm_(mine, max_norm, norm, foreach=foreach) is None
        clip_grads_with_norm_(theirs, max_norm, norm, foreach=foreach)
        for ours, torchs in zip(grads(mine), grads(theirs), strict=True):
            assert_close(ours, torchs, dtype)


def test_two_calls_equal_one(backend: Backend) -> None:
    one, two = pair(torch.float32, backend, 10.0)
    norm = sg.clip_grad_norm_(one, 1.0)
    total = sg.get_total_norm(grads(two))
    sg.clip_grads_with_norm_(two, 1.0, total)
    assert torch.equal(norm, total)
    assert_close(as_vector(one), as_vector(two), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("clip_value", [0.3, 0.0, 1e-3, math.inf, 2])
def test_clip_grad_value_equals_torch(
    backend: Backend, dtype: torch.dtype, foreach: bool | None, clip_value: float
) -> None:
    mine, theirs = pair(dtype, backend)
    for params in (mine, theirs):
        gradient = params[6].grad
        assert gradient is not None
        gradient[2:5] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    assert sg.clip_grad_value_(mine, clip_value, foreach=foreach) is None
    clip_grad_value_(theirs, clip_value, foreach=foreach)
    for ours, torchs in zip(grads(mine), grads(theirs), strict=True):
        assert torch.equal(ours.isnan(), torchs.isnan())
        assert torch.equal(ours.nan_to_num(9.0), torchs.nan_to_num(9.0))


@pytest.mark.parametrize("layout", range(5))
def test_the_gaps_of_a_strided_gradient_are_not_written(backend: Backend, layout: int) -> None:
    whole = torch.full((12, 30), 5.0, device=backend.device)
    gradient = like_layout(whole, layout) if layout != 3 else whole[:, 1::2]
    base = whole if layout == 3 else None
    params = with_gradients([gradient, torch.full((7,), 5.0, device=backend.device)])
    sg.clip_grad_norm_(params, 1.0)
    norm = 5.0 * math.sqrt(gradient.numel() + 7)
    assert_close(gradient, torch.full(gradient.shape, 5.0 / norm), torch.float32)
    if base is not None:
        assert torch.equal(base[:, ::2], torch.full((12, 15), 5.0))


def test_an_expanded_gradient_is_right_or_refused(backend: Backend) -> None:
    for shape in ((6,), (3, 6)):
        params = with_gradients(
            [
                torch.full((9,), 50.0, device=backend.device),
                torch.full((1,), 50.0, device=backend.device).expand(shape),
            ]
        )
        snapshot = Snapshot(params)
        try:
            sg.clip_grad_norm_(params, 1.0)
        except (ValueError, RuntimeError) as refusal:
            assert "clip_grad_norm_" in str(refusal) and "parameters" in str(refusal)
            snapshot.assert_unchanged()
        else:
            vector = as_vector(params)
            assert_close(vector, torch.full_like(vector, vector.numel() ** -0.5), torch.float32)


def test_complex_gradients_are_clipped_as_in_torch(backend: Backend) -> None:
    for dtype in (torch.complex64, torch.complex128):
        values = torch.randn(3, 40, dtype=dtype, device=backend.device) * 10
        mine, theirs = with_gradients([values.clone()]), with_gradients([values.clone()])
        got, want = sg.clip_grad_norm_(mine, 1.0), clip_grad_norm_(theirs, 1.0)
        real = torch.float32 if dtype == torch.complex64 else torch.float64
        assert_close(got, want, real)
        for ours, torchs in zip(grads(mine), grads(theirs), strict=True):
            assert ours.dtype == dtype
            assert_close(torch.view_as_real(ours), torch.view_as_real(torchs), real)


def test_duplicate_parameters_count_once(backend: Backend) -> None:
    values = torch.full((16,), 2.0, device=backend.device)
    (param,) = with_gradients([values])
    assert sg.clip_grad_norm_([param, param, param], 1.0).item() == 8.0
    assert param.grad is not None
    assert_close(param.grad, torch.full((16,), 0.25), torch.float32)
    sg.clip_grads_with_norm_([param, param], 0.5, torch.tensor(1.0))
    assert_close(param.grad, torch.full((16,), 0.125), torch.float32)


def test_every_kind_of_iterable(backend: Backend) -> None:
    def fresh() -> list[Parameter]:
        return with_gradients([torch.full((n,), 3.0, device=backend.device) for n in (4, 12)])

    for make in (list, tuple, iter, lambda ps: (p for p in ps), lambda ps: dict.fromkeys(ps)):
        params = fresh()
        assert sg.clip_grad_norm_(make(params), 1.0).item() == 12.0
        assert_close(as_vector(params), torch.full((16,), 0.25), torch.float32)
        params = fresh()
        sg.clip_grad_value_(make(params), 0.5)
        assert torch.equal(as_vector(params), torch.full((16,), 0.5))
    params = fresh()
    assert sg.clip_grad_norm_(params[0], 3.0).item() == 6.0
    assert_close(params[0].grad, torch.full((4,), 1.5), torch.float32)


def test_nothing_to_clip(backend: Backend) -> None:
    without = Parameter(torch.ones(3, device=backend.device))
    for nothing in ([], [without], without, ()):
        assert sg.clip_grad_norm_(nothing, 1.0).item() == 0.0
        sg.clip_grads_with_norm_(nothing, 1.0, torch.tensor(3.0))
        sg.clip_grad_value_(nothing, 1.0)
    assert without.grad is None
    zeros = with_gradients([torch.zeros(40, device=backend.device)])
    assert sg.clip_grad_norm_(zeros, 0.0).item() == 0.0
    assert torch.equal(as_vector(zeros), torch.zeros(40))


def test_a_mixed_list_is_clipped_by_one_norm(backend: Backend) -> None:
    like = [torch.full((25,), 3.0, dtype=dtype, device=backend.device) for dtype in DTYPES]
    params = with_gradients(like)
    norm = sg.clip_grad_norm_(params, 1.0)
    assert norm.dtype == torch.float64 and norm.item() == pytest.approx(30.0)
    for gradient in grads(params):
        want = torch.full((25,), 3.0 / (30.0 + 1e-6), dtype=torch.float64).to(gradient.dtype)
        assert_close(gradient, want, torch.float32)


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 4)), min_size=1, max_size=6),
    st.sampled_from(FULL),
    st.floats(1e-3, 1e3),
    st.floats(1e-4, 1e4),
    st.integers(0, 1000),
)
def test_any_list_equals_the_reference(
    backend: Backend,
    drawn: list[tuple[int, int]],
    dtype: torch.dtype,
    scale: float,
    max_norm: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for size, layout in drawn:
        values = torch.randn(2, size, generator=generator, dtype=torch.float64) * scale
        tensors.append(like_layout(values.to(dtype).to(backend.device), layout))
    params = with_gradients(tensors)
    want, norm = reference.clip_grad_norm([t.double().cpu().numpy() for t in tensors], max_norm)
    before = [bits(t) for t in tensors]
    got = sg.clip_grad_norm_(params, max_norm)
    assert_close(got, norm, dtype)
    for ours, expected in zip(tensors, want, strict=True):
        assert_close(ours, expected, dtype)
    if norm + 1e-6 <= max_norm * (1 - 1e-12):
        assert all(torch.equal(bits(t), b) for t, b in zip(tensors, before, strict=True))


def test_the_same_bits_for_every_number_of_threads(backend: Backend) -> None:
    threads, results = torch.get_num_threads(), []
    values = torch.randn(300_001, device=backend.device) * 10
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            (param,) = with_gradients([values.clone()])
            norm = sg.clip_grad_norm_([param], 1.0)
            assert param.grad is not None
            results.append((norm, param.grad))
    finally:
        torch.set_num_threads(threads)
    for norm, gradient in results[1:]:
        assert same_bits(norm, results[0][0]) and same_bits(gradient, results[0][1])


def test_a_generator_that_was_used_up_is_warned_about_as_torch_does() -> None:
    def warned(clip: Any, *limits: Any) -> list[tuple[str, type[Warning], str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for params in (p for p in ()), [], iter([]):
                clip(params, *limits)
        return [(str(w.message), w.category, w.filename) for w in caught]

    torchs = warned(clip_grad_norm_, 1.0)
    assert len(torchs) == 1 and torchs[0][1:] == (UserWarning, __file__)
    assert warned(sg.clip_grad_norm_, 1.0) == warned(sg.clip_grad_value_, 1.0) == torchs
    assert warned(sg.clip_grads_with_norm_, 1.0, 2.0) == torchs
