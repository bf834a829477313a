"""Tensors that no kernel takes go through torch's operations: on several devices, on other devices, or complex."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, get_total_norm

import steadygrad as sg
from steadygrad import _kernels, composite
from steadygrad.reference.norm import total_norm
from tests.foreign_tensors import ForeignDevices, numbers, parameter
from tests.tolerances import float64

PS = [2.0, 1.0, math.inf, -math.inf, 0.0, 3.5]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(7,), (3, 4), (), (2, 0), (5, 6)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*made[:4], made[4].t()]


def complex_parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(4)
    params = [
        torch.randn(5, generator=generator, dtype=torch.complex64),
        torch.randn(3, 2, generator=generator),
    ]
    params[0][0] = 0
    made = [Parameter(param) for param in params]
    for param in made:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", PS)
def test_norm_is_that_of_the_reference(p: float, dtype: torch.dtype) -> None:
    grads = gradients(dtype)
    if p < 0:
        grads = [grad for grad in grads if grad.numel()]
    expected = total_norm([float64(grad) for grad in grads], p)
    found = composite.get_total_norm(grads, p)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clips_and_penalties_are_those_of_the_kernels(dtype: torch.dtype) -> None:
    rtol = {torch.float32: 1e-6, torch.float64: 1e-6}.get(dtype, 2e-2)
    params = [Parameter(p) for p in gradients(dtype)]
    for param, grad in zip(params, reversed(gradients(dtype)), strict=True):
        param.grad = torch.ones_like(param) * (grad.numel() + 1)
    ours, theirs = params, copy.deepcopy(params)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        other.grad = one.grad.clone()

    def grads(params: list[Parameter]) -> list[Tensor]:
        return [param.grad for param in params if param.grad is not None]

    def same() -> None:
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(float64(one), float64(other), rtol=rtol, atol=1e-6)
            assert one.grad is not None and other.grad is not None
            np.testing.assert_allclose(float64(one.grad), float64(other.grad), rtol=rtol, atol=1e-6)

    with torch.no_grad():
        value = composite.add_penalty_(ours, grads(ours), 0.1, 0.2)
        assert value.item() == pytest.approx(sg.add_penalty_(theirs, 0.1, 0.2).item(), rel=1e-2)
        same()
        norm = composite.get_total_norm(grads(ours), 2.0)
        composite.clip_grads_with_norm_(grads(ours), 1.0, norm)
        sg.clip_grad_norm_(theirs, 1.0)
        same()
        composite.clip_grad_value_(grads(ours), 0.05)
        sg.clip_grad_value_(theirs, 0.05)
        same()
        composite.soft_threshold_(ours, 0.3)
        sg.soft_threshold_(theirs, 0.3)
        same()


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
def test_complex_tensors_are_taken_as_torch_takes_them(p: float) -> None:
    ours, theirs = complex_parameters(), complex_parameters()
    assert sg.get_total_norm([q.grad for q in ours if q.grad is not None], p).item() == (
        pytest.approx(get_total_norm([q.grad for q in theirs if q.grad is not None], p).item())
    )
    norm = sg.clip_grad_norm_(ours, 0.5, p)
    assert norm.item() == pytest.approx(clip_grad_norm_(theirs, 0.5, p).item())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_complex_penalties_are_those_of_autograd() -> None:
    params, twins = complex_parameters(), complex_parameters()
    value = sg.add_penalty_(params, l1=0.3, l2=0.7)
    penalty = torch.stack(
        [0.3 * q.abs().sum() + 0.35 * (q * q.conj()).real.sum() for q in twins]
    ).sum()
    penalty.backward()
    assert value.item() == pytest.approx(penalty.item(), rel=1e-6)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.grad, twin.grad)
    sg.soft_threshold_(params, 0.5)
    for param, twin in zip(params, twins, strict=True):
        expected = twin.sgn() * (twin.abs() - 0.5).clamp(min=0)
        torch.testing.assert_close(param.detach(), expected.detach())


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu"), ("mps", "mps")], ids=str)
def test_several_devices_and_devices_without_kernels_are_taken(devices: tuple[str, str]) -> None:
    """Use fake tensors, which have a device and no numbers, to see that every device is accepted."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [Parameter(torch.ones(3, device=devices[0]))]
        params.append(Parameter(torch.ones(2, 2, device=devices[1], dtype=torch.bfloat16)))
        for param in params:
            param.grad = torch.ones_like(param)
        norm = sg.clip_grad_norm_(params, 1.0)
        assert (norm.device.type, norm.shape, norm.dtype) == (devices[0], (), torch.float32)
        total = sg.get_total_norm([param.grad for param in params if param.grad is not None])
        assert total.device.type == devices[0]
        sg.clip_grads_with_norm_(params, 1.0, 2.0)
        sg.clip_grad_value_(params, 0.1)
        assert sg.add_penalty_(params, 0.1, 0.1).device.type == devices[0]
        sg.soft_threshold_(params, 0.25)


def test_a_tensor_that_appears_twice_counts_once() -> None:
    once, twice = complex_parameters(), complex_parameters()
    values = [sg.add_penalty_(params, 0.3, 0.7) for params in (once, twice * 2)]
    assert values[0] == values[1]
    norms = [sg.clip_grad_norm_(params, 0.5, 1.0) for params in (once, twice * 2)]
    assert norms[0] == norms[1]
    sg.soft_threshold_(once, 0.25)
    sg.soft_threshold_(twice * 2, 0.25)
    for one, other in zip(once, twice, strict=True):
        assert torch.equal(one, other)
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_nothing_is_recorded_by_autograd() -> None:
    params = complex_parameters()
    for param in params:
        assert param.grad is not None
        param.grad.requires_grad_()
    assert not sg.clip_grad_norm_(params, 0.5, 1.0).requires_grad
    sg.add_penalty_(params, 0.1)
    assert all(param.grad is not None and param.grad.is_leaf for param in params)


def test_nonfinite_elements_are_refused_and_nothing_is_changed() -> None:
    params = complex_parameters()
    assert params[1].grad is not None
    params[1].grad[0, 0] = math.nan
    before = [p.grad.clone() for p in params if p.grad is not None]
    for function in (
        lambda: sg.clip_grad_norm_(params, 1.0, 1.0, error_if_nonfinite=True),
        lambda: sg.get_total_norm([p.grad for p in params], 1.0, error_if_nonfinite=True),  # type: ignore[misc]
    ):
        with pytest.raises(RuntimeError, match="expected finite gradients, got 1 non-finite"):
            function()
    for grad, kept in zip((p.grad for p in params), before, strict=True):
        torch.testing.assert_close(grad, kept, equal_nan=True)


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.int64), np.ones(2), "text"],
    ids=["sparse", "integers", "NumPy", "text"],
)
def test_what_torch_cannot_take_either_is_still_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"get_total_norm: tensors\[1\]: expected"):
        sg.get_total_norm([torch.ones(2), wrong])


@pytest.mark.parametrize("order", [("cpu", "mps", "xpu"), ("mps", "cpu", "xpu")], ids=str)
def test_lists_over_several_devices_are_clipped_by_one_norm(order: tuple[str, ...]) -> None:
    """The stand-ins refuse operations across devices, and numbers that the host may read too early."""
    params = [parameter(torch.ones(n), device) for n, device in zip((3, 5, 8), order, strict=True)]
    with ForeignDevices():
        for give, clip in (
            (2.0, lambda: sg.clip_grad_norm_(params, 4.0)),
            (2.0, lambda: sg.clip_grads_with_norm_(params, 4.0, 8.0)),
            (2.0, lambda: sg.clip_grads_with_norm_(params, 4.0, torch.tensor(8.0))),
            (2.0, lambda: sg.clip_grad_value_(params, 1.0)),
        ):
            for param in params:
                param.grad = torch.full_like(param, give)
            norm = clip()
            if norm is not None:
                assert norm.device == params[0].device and norm.item() == pytest.approx(8.0)
            for param in params:
                assert param.grad is not None
                assert numbers(param.grad).tolist() == pytest.approx([1.0] * param.numel())
        value = sg.add_penalty_(params, l1=0.5, l2=0.25)
        assert value.device == params[0].device and value.item() == pytest.approx(10.0)


def test_what_is_refused_in_a_list_leaves_the_others_alone() -> None:
    params = complex_parameters()
    params[1].grad = torch.full((1,), 30.0).expand(3, 2)
    assert params[0].grad is not None
    before = params[0].grad.clone()
    for name, call in (
        ("clip_grad_norm_", lambda: sg.clip_grad_norm_(params, 1.0, 1.0)),
        ("clip_grads_with_norm_", lambda: sg.clip_grads_with_norm_(params, 1.0, 9.0)),
        ("add_penalty_", lambda: sg.add_penalty_(params, 1.0)),
    ):
        with pytest.raises(ValueError, match=rf"{name}: param\S+: expected .*expanded"):
            call()
        assert torch.equal(params[0].grad, before)


def test_a_limit_is_checked_where_the_norm_is_on_a_device_without_kernels() -> None:
    param = parameter(torch.ones(3), "mps")
    param.grad = torch.full_like(param, 2.0)
    with ForeignDevices():
        norm = sg.get_total_norm([param.grad])
    for limit in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"clip_grads_with_norm_: max_norm: expected a number"):
            sg.clip_grads_with_norm_([param], limit, norm)
    assert numbers(param.grad).tolist() == [2.0] * 3


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.0])
def test_norms_over_processes_use_the_rows_of_the_kernels(p: float) -> None:
    grads = [torch.full((4,), 1e200, dtype=torch.float64), torch.ones(2), torch.ones(3)]
    counted = torch.tensor([1, 0, 1], dtype=torch.int32)
    rows = torch.empty(2, len(_kernels.SCOPE_COLUMNS), dtype=torch.float64)
    seen = []
    reduction = _kernels.Reduction(
        rows=rows, counted=counted, reduce=lambda: seen.append(rows.clone())
    )
    found = composite.reduced_norm(grads, p, reduction)
    exact = total_norm([grads[0].numpy(), grads[2].numpy()], p)
    assert found.norm == pytest.approx(exact, rel=1e-12)
    composite_rows, seen = seen[0], []
    expected, nonfinite, _ = _kernels.grad_norm(grads, p, None, lambda size: None, reduction)  # type: ignore[arg-type, return-value]
    assert found.norm == pytest.approx(expected, rel=1e-12) and nonfinite == 0
    if p != 2:  # whose small terms have a column of their own
        torch.testing.assert_close(composite_rows, seen[0], rtol=1e-12, atol=0)


def test_an_element_that_is_broken_on_any_process_breaks_the_norm() -> None:
    rows = torch.empty(2, len(_kernels.SCOPE_COLUMNS), dtype=torch.float64)

    def reduce() -> None:
        rows[1, _kernels.SCOPE_COLUMNS.index("nonfinite")] += 1

    counted = torch.ones(0, dtype=torch.int32)
    reduction = _kernels.Reduction(rows=rows, counted=counted, reduce=reduce)
    found = composite.reduced_norm([], 2.0, reduction)
    assert (found.norm, found.nonfinite) == (math.inf, 1)
