"""add_penalty_ and soft_threshold_ compared with autograd, torch and the NumPy reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.reference import penalty as reference
from tests.backends import Backend
from tests.optim.parameter_sets import assign, gradient_sequence, like_layout, mixed_parameters
from tests.snapshots import Snapshot, assert_refused, bits
from tests.tolerances import assert_close, assert_error_at_most_twice_torch, float64

FULL = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*FULL, *HALVES]
STRENGTHS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (1e-3, 2e-2)]
NON_NEGATIVE = "non-negative|nonnegative|>= ?0|at least 0|not negative"


def with_penalized_gradients(dtype: torch.dtype, backend: Backend) -> list[Parameter]:
    """Return parameters of every layout, with exact zeros among their elements, and gradients."""
    params = mixed_parameters(dtype, backend.device)
    with torch.no_grad():
        params[6][:5] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 0.0], dtype=dtype)
    (gradients,) = gradient_sequence(params, 1, decades=0)
    assign(params, gradients)
    params[5].grad = None
    return params


@pytest.mark.parametrize(("l1", "l2"), STRENGTHS)
@pytest.mark.parametrize("dtype", FULL)
def test_equals_autograd_of_the_penalized_loss(
    backend: Backend, dtype: torch.dtype, l1: float, l2: float
) -> None:
    params = with_penalized_gradients(dtype, backend)
    taking_part = [p for p in params if p.grad is not None]
    copies = [p.detach().double().requires_grad_() for p in taking_part]
    penalty = sum((l1 * p.abs().sum() + l2 / 2 * p.square().sum() for p in copies), torch.zeros(()))
    loss = penalty + sum(
        (p * p_.grad.double()).sum() for p, p_ in zip(copies, taking_part, strict=True)
    )
    loss.backward()
    got = sg.add_penalty_(params, l1=l1, l2=l2)
    assert got.dim() == 0 and got.dtype == torch.float64 and not got.requires_grad
    assert_close(got, penalty, torch.float64)
    for param, copy in zip(taking_part, copies, strict=True):
        assert_close(param.grad, copy.grad, dtype)
    assert params[5].grad is None


@pytest.mark.parametrize(("l1", "l2"), STRENGTHS[1:])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_types_are_as_exact_as_torch(
    backend: Backend, dtype: torch.dtype, l1: float, l2: float
) -> None:
    params = [p for p in with_penalized_gradients(dtype, backend) if p.grad is not None]
    exact = [float64(p.grad) + reference.penalty_gradient(float64(p), l1, l2) for p in params]
    torchs = [p.grad + l1 * p.detach().sign() + l2 * p.detach() for p in params]
    value = reference.penalty_value([float64(p) for p in params], l1, l2)
    assert_close(sg.add_penalty_(params, l1=l1, l2=l2), value, torch.float64)
    for param, by_torch, want in zip(params, torchs, exact, strict=True):
        assert param.grad is not None
        assert_error_at_most_twice_torch(param.grad, by_torch, want)


def test_parameters_are_only_read(backend: Backend) -> None:
    params = with_penalized_gradients(torch.float32, backend)
    before, versions = [bits(p) for p in params], [p._version for p in params]
    sg.add_penalty_(params, l1=0.1, l2=0.1)
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    assert [p._version for p in params] == versions


def test_written_gradients_get_a_new_version(backend: Backend) -> None:
    weight = torch.ones(5, device=backend.device, requires_grad=True)
    param = Parameter(torch.ones(5, device=backend.device))
    param.grad = torch.ones(5, device=backend.device)
    product = (weight * param.grad).sum()
    sg.add_penalty_([param], l1=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_the_sign_of_zero_is_zero(backend: Backend) -> None:
    param = Parameter(torch.tensor([0.0, -0.0, 1e-45, -1e-45], device=backend.device))
    param.grad = torch.zeros(4, device=backend.device)
    sg.add_penalty_([param], l1=0.5)
    assert param.grad.tolist() == [0.0, 0.0, 0.5, -0.5]


def test_a_parameter_counts_once(backend: Backend) -> None:
    param = Parameter(torch.full((3,), -2.0, device=backend.device))
    param.grad = torch.zeros(3, device=backend.device)
    assert sg.add_penalty_([param, param], l1=1.0, l2=1.0).item() == 6.0 + 6.0
    assert param.grad.tolist() == [-3.0] * 3
    assert sg.add_penalty_(param, l1=1.0).item() == 6.0
    assert sg.add_penalty_((p for p in [param]), l1=1.0).item() == 6.0


def test_the_value_neither_overflows_nor_loses_small_terms(backend: Backend) -> None:
    param = Parameter(torch.full((100_000,), 3e30, device=backend.device))
    small = Parameter(torch.full((100_000,), 1e-30, device=backend.device))
    param.grad, small.grad = torch.zeros_like(param), torch.zeros_like(small)
    want = reference.penalty_value([float64(param)], 0.5, 0.25)
    assert_close(sg.add_penalty_([param], l1=0.5, l2=0.25) / want, 1.0, torch.float64)
    want = reference.penalty_value([float64(small)], 0.5, 0.25)
    assert_close(sg.add_penalty_([small], l1=0.5, l2=0.25) / want, 1.0, torch.float64)


def test_nothing_to_penalize(backend: Backend) -> None:
    without = Parameter(torch.ones(3, device=backend.device))
    for nothing in ([], [without], without):
        value = sg.add_penalty_(nothing, l1=1.0, l2=1.0)
        assert value.item() == 0.0 and value.dtype == torch.float64
    assert without.grad is None
    sg.soft_threshold_([], 1.0)


def torch_soft_threshold(param: Tensor, amount: float) -> Tensor:
    return param.sign() * (param.abs() - amount).clamp(min=0)


@pytest.mark.parametrize("amount", [0.0, 1e-3, 0.5, 1.7, 100.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_threshold(backend: Backend, dtype: torch.dtype, amount: float) -> None:
    params = mixed_parameters(dtype, backend.device)
    before = [p.detach().clone() for p in params]
    versions = [p._version for p in params]
    assert sg.soft_threshold_(params, amount) is None
    for param, old, version in zip(params, before, versions, strict=True):
        want = reference.soft_threshold(float64(old), amount)
        if dtype in FULL:
            assert_close(param, want, dtype)
        else:
            assert_error_at_most_twice_torch(
                param.detach(), torch_soft_threshold(old, amount), want
            )
        inside = float64(old.abs()) <= amount
        assert (float64(param)[inside] == 0.0).all(), "exact zeros"
        changed = not torch.equal(param.detach(), old)
        assert param._version > version or not changed


def test_soft_threshold_of_a_used_parameter_raises_in_backward(backend: Backend) -> None:
    param = Parameter(torch.ones(5, device=backend.device))
    square = (param * param).sum()
    sg.soft_threshold_([param], 0.25)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_soft_threshold_once_for_duplicates_and_only_within_the_view(backend: Backend) -> None:
    base = torch.full((20,), 3.0, device=backend.device)
    param = Parameter(base[::2])
    sg.soft_threshold_([param, param], 1.0)
    assert base.tolist() == [2.0, 3.0] * 10


def test_soft_threshold_keeps_special_values_as_torch_does(backend: Backend) -> None:
    values = [0.0, -0.0, math.inf, -math.inf, 1e-42, -1e-42, 3e38]
    param = Parameter(torch.tensor(values, device=backend.device))
    sg.soft_threshold_([param], 0.5)
    assert param.tolist() == torch_soft_threshold(torch.tensor(values), 0.5).tolist()


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4)), max_size=5),
    st.sampled_from(FULL),
    st.floats(0, 10),
    st.floats(0, 10),
    st.integers(0, 1000),
)
def test_any_list_equals_the_reference(
    backend: Backend,
    drawn: list[tuple[int, int]],
    dtype: torch.dtype,
    l1: float,
    l2: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for size, layout in drawn:
        values = torch.randn(2, size, generator=generator, dtype=dtype).to(backend.device)
        param = Parameter(like_layout(values, layout))
        param.grad = like_layout(values.cos(), 4 - layout)
        params.append(param)
    want = [float64(p.grad) + reference.penalty_gradient(float64(p), l1, l2) for p in params]
    value = sg.add_penalty_(params, l1, l2)
    assert_close(
        value, reference.penalty_value([float64(p) for p in params], l1, l2), torch.float64
    )
    for param, expected in zip(params, want, strict=True):
        assert_close(param.grad, expected, dtype)


@pytest.mark.parametrize("value", [-0.5, math.nan, -math.inf])
@pytest.mark.parametrize("argument", ["l1", "l2", "amount"])
def test_negative_and_nan_strengths_are_refused(
    backend: Backend, argument: str, value: float
) -> None:
    params = with_penalized_gradients(torch.float32, backend)
    function = "soft_threshold_" if argument == "amount" else "add_penalty_"
    assert_refused(
        lambda: getattr(sg, function)(params, **{argument: value}),
        ValueError,
        function=function,
        argument=argument,
        expected=NON_NEGATIVE,
        got=str(value),
        unchanged=[Snapshot(params)],
    )
