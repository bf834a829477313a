"""Clipping by output unit, compared with its definition and with the formula in torch, on every backend."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from steadygrad import _kernels
from steadygrad.reference import policies as reference
from tests.backends import BACKENDS, Backend
from tests.optim import unfused
from tests.optim.device_twins import asynchronous_device, no_waiting
from tests.optim.optimizer_runs import tensor_state
from tests.optim.parameter_sets import (
    assign,
    assign_copies,
    dense_parameters,
    gradient_sequence,
    mixed_parameters,
)
from tests.snapshots import assert_same_tree, bits

# Rows are shorter and longer than a tile and a chunk, and their number does not fit a block of warps.
UNITS = ((10, 3, 3, 3), (5, 9000), (20_000,), (3, 128), (7, 1), (1, 300), (2, 1030), (257, 2))


def units_of(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [
        Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device))
        for shape in UNITS
    ]


def as_defined(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], clip: sg.ClipAdaptive
) -> list[Tensor | None]:
    """Return the gradients clipped as the reference defines it, in float64."""
    policy = reference.ClipAdaptive(clip.clipping, clip.eps)
    clipped: list[Tensor | None] = []
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            clipped.append(None)
            continue
        weight, gradient = (t.detach().double().cpu().numpy() for t in (param, grad))
        with np.errstate(invalid="ignore"):
            clipped.append(torch.as_tensor(gradient * policy.coefficients(weight, gradient)))
    return clipped


def as_timm_has_it(param: Tensor, grad: Tensor, clip: sg.ClipAdaptive) -> Tensor:
    """Apply the formula of ``timm.utils.adaptive_clip_grad``, with its least gradient norm of 1e-6."""
    weights, rows = (
        t.reshape(1, -1) if t.ndim < 2 else t.reshape(t.shape[0], -1) for t in (param, grad)
    )
    limits = clip.clipping * torch.linalg.vector_norm(weights, dim=1).clamp(min=clip.eps)
    norms = torch.linalg.vector_norm(rows, dim=1)
    scaled = rows * (limits / norms.clamp(min=1e-6))[:, None]
    return torch.where((norms < limits)[:, None], rows, scaled).reshape(grad.shape)


def assert_moved(
    params: Sequence[Tensor], before: Sequence[Tensor], grads: Sequence[Tensor | None], rtol: float
) -> None:
    """Check that a step of SGD with a rate of 1 used these gradients."""
    for param, old, grad in zip(params, before, grads, strict=True):
        want = old.double().cpu() - (0 if grad is None else grad)
        assert torch.allclose(param.detach().double().cpu(), want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [units_of, lambda d, t: mixed_parameters(t, d)], ids=["u", "mix"])
def test_it_follows_its_reference(
    backend: Backend, make: Callable[..., list[Parameter]], dtype: torch.dtype
) -> None:
    clip = sg.ClipAdaptive(0.05)
    params = make(backend.device, dtype)
    optimizer = sg.optim.SGD(params, lr=1.0, clip=clip)
    for grads in gradient_sequence(params, 8, seed=1, decades=4):
        assign(params, grads)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        expected = as_defined(before, grads, clip)
        assert_moved(params, before, expected, 1e-6 if dtype == torch.float32 else 1e-13)
    assert optimizer.path == backend.fused_path
    assert 0 < optimizer.clipped_steps <= 8


def test_it_follows_the_formula_of_timm(backend: Backend) -> None:
    clip = sg.ClipAdaptive()
    params = dense_parameters(torch.float64, backend.device)
    theirs = copy.deepcopy(params)
    optimizer = sg.optim.AdamW(params, lr=1e-2, clip=clip)
    twin = torch.optim.AdamW(theirs, lr=1e-2)
    for grads in gradient_sequence(params, 60, seed=2, decades=6):
        assign_copies(params, grads)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = None if grad is None else as_timm_has_it(param.detach(), grad, clip)
        optimizer.step()
        twin.step()
    for param, their in zip(params, theirs, strict=True):
        assert torch.allclose(param, their, rtol=1e-9, atol=1e-12)


def run(device: torch.device, threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params = [*units_of(device), *mixed_parameters(device=device)]
        params += [Parameter(p.detach().bfloat16()) for p in units_of(device)[:3]]
        params += mixed_parameters(torch.float64, device)
        optimizer = sg.optim.AdamW(params, lr=0.1, clip=sg.ClipAdaptive(), clip_value=0.1, l2=0.1)
        for grads in gradient_sequence(params, 4, decades=4):
            assign_copies(params, grads)
            optimizer.step()
        return [p.detach() for p in params] + [
            t for state in optimizer.state.values() for t in state.values()
        ]
    finally:
        torch.set_num_threads(before)


def test_the_same_bits_everywhere() -> None:
    cpu = torch.device("cpu")
    runs = [run(cpu, threads) for threads in (1, 2, 3)]
    if BACKENDS[1].why_not() is None:
        with BACKENDS[1].active():
            runs.append(run(cpu, 1))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "master"])
def test_half_precision(backend: Backend, dtype: torch.dtype, rounding: Any) -> None:
    clip = sg.ClipAdaptive()
    params = [*mixed_parameters(dtype, backend.device), *units_of(backend.device, dtype)]
    optimizer = sg.optim.SGD(params, lr=1.0, clip=clip, rounding=rounding)
    (grads,) = gradient_sequence(params, 1, seed=4, decades=0)
    assign(params, grads)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    ulp = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    assert_moved(params, before, as_defined(before, grads, clip), ulp)


def clipped(grads: Sequence[Tensor | None], params: Sequence[Tensor], **how: Any) -> list[Tensor]:
    """Return what a step with ``write_grads`` leaves in ``.grad``."""
    assign_copies(params, grads)
    make = how.pop(
        "make", lambda given, **ours: sg.optim.SGD(given, lr=1.0, write_grads=True, **ours)
    )
    optimizer = make(params, **how)
    optimizer.step()
    return [p.grad.detach().clone() for p in params if p.grad is not None]


@pytest.mark.kernels
def test_every_path_takes_the_same_gradient(backend: Backend) -> None:
    params = [*mixed_parameters(device=backend.device), *units_of(backend.device)]
    (grads,) = gradient_sequence(params, 1, seed=5, decades=0)
    before = [param.detach().clone() for param in params]
    ours: dict[str, Any] = {"clip": sg.ClipAdaptive(), "l2": 0.3, "clip_value": 0.02}

    def again() -> list[Parameter]:
        return [Parameter(old.clone(memory_format=torch.preserve_format)) for old in before]

    written = clipped(grads, again(), **ours)
    in_place = clipped(
        grads,
        again(),
        make=lambda given, **options: sg.Stabilizer(unfused.Adadelta(given), **options),
        **ours,
    )
    assert_same_tree(in_place, written)
    read = again()
    assign(read, grads)
    optimizer = sg.optim.SGD(read, lr=1.0, **ours)
    optimizer.step()
    for param, old, grad in zip(read, before, written, strict=True):
        assert torch.equal(param.detach(), old - grad)
    penalised = [
        None if g is None else g.double() + 0.3 * p.double()
        for g, p in zip(grads, before, strict=True)
    ]
    expected = as_defined(before, penalised, ours["clip"])
    for got, want in zip(written, expected, strict=True):
        assert want is not None
        assert torch.allclose(got.double().cpu(), want.clamp(-0.02, 0.02), rtol=1e-5, atol=1e-8)


def two_units(backend: Backend, *rows: float) -> list[Parameter]:
    """Return a parameter with two units of norm 5, one of norm 2, and one of zeros, with gradients along (0.6, 0.8)."""
    values = [[[3.0, 4.0], [0.0, -5.0]], [2.0], [0.0]]
    params = [
        Parameter(torch.tensor(v, dtype=torch.float64, device=backend.device)) for v in values
    ]
    first, second, third, fourth = rows
    params[0].grad = params[0].new_tensor([[0.6 * first, 0.8 * first], [second, 0.0]])
    params[1].grad, params[2].grad = params[1].new_tensor([third]), params[2].new_tensor([fourth])
    return params


def norms_taken(params: list[Parameter], optimizer: Any) -> list[float]:
    before = [param.detach().clone() for param in params]
    optimizer.step()
    steps = [old - param.detach() for old, param in zip(before, params, strict=True)]
    return [*steps[0].norm(dim=1).tolist(), *(step.abs().item() for step in steps[1:])]


def test_limits_of_param_groups(backend: Backend) -> None:
    params = two_units(backend, 1.0, 0.4, 1.0, 1.0)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "clipping": 0.25},
        {"params": params[2:]},
    ]
    optimizer = sg.optim.SGD(groups, lr=1.0, clip=sg.ClipAdaptive(0.1, eps=0.5))
    assert np.allclose(norms_taken(params, optimizer), [0.5, 0.4, 0.5, 0.05])
    assert [group["clipping"] for group in optimizer.param_groups] == [0.1, 0.25, 0.1]
    params = two_units(backend, 1.0, 0.4, 1.0, 1.0)
    groups = [{"params": params[:1]}, {"params": params[1:], "clipping": None}]
    optimizer = sg.optim.SGD(groups, lr=1.0, clip=sg.ClipAdaptive(0.1))
    assert np.allclose(norms_taken(params, optimizer), [0.5, 0.4, 1.0, 1.0])
    optimizer.param_groups[1]["clipping"] = 0.1  # changes between steps
    for param, old in zip(params, two_units(backend, 1.0, 0.4, 1.0, 1.0), strict=True):
        param.data.copy_(old.data)
    assert np.allclose(norms_taken(params, optimizer), [0.5, 0.4, 0.2, 1e-4])


@pytest.mark.kernels
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_a_param_groups_max_norm_is_a_cap(backend: Backend, scope: Any) -> None:
    params = two_units(backend, 4.0, 3.0, 12.0, 0.0)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = sg.optim.SGD(groups, lr=1.0, clip=sg.ClipAdaptive(0.2), clip_scope=scope)
    optimizer.param_groups[0]["max_norm"] = 0.5
    capped = 0.5 / ((13.0 if scope == "global" else 5.0) + 1e-6)
    assert np.allclose(norms_taken(params, optimizer), [4 * capped, 3 * capped, 0.4, 0.0])
    assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == 13.0
    optimizer.param_groups[0]["max_norm"] = 100.0
    params_again = two_units(backend, 4.0, 3.0, 12.0, 0.0)
    for param, old in zip(params, params_again, strict=True):
        param.data.copy_(old.data)
    assert np.allclose(norms_taken(params, optimizer), [1.0, 1.0, 0.4, 0.0])


def test_clipped_steps_are_counted(backend: Backend) -> None:
    optimizer: Any = None
    for rows, clips in (
        ((0.1, 0.1, 0.01, 0.0), 0),
        ((0.6, 0.1, 0.01, 0.0), 1),
        ((0.1,) * 4, 2),
        ((0.01,) * 3 + (0.0,), 2),
    ):
        params = two_units(backend, *rows)
        if optimizer is None:
            kept = params
            optimizer = sg.optim.SGD(kept, lr=0.0, clip=sg.ClipAdaptive(0.1), weight_decay=0.0)
        for param, given in zip(kept, params, strict=True):
            param.grad = given.grad
        optimizer.step()
        assert optimizer.clipped_steps == clips


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("make", ["fused", "in-place"])
def test_nonfinite_gradients(backend: Backend, bad: float, make: str) -> None:
    def made(params: list[Parameter], **ours: Any) -> Any:
        ours["clip"] = sg.ClipAdaptive(0.1)
        if make == "fused":
            return sg.optim.SGD(params, lr=1.0, **ours)
        return sg.Stabilizer(torch.optim.ASGD(params, lr=1.0, lambd=0.0), **ours)

    rows = (1.0, bad, 1.0, 1.0)
    params = two_units(backend, *rows)
    optimizer = made(params)
    assert norms_taken(params, optimizer) == [0.0] * 4
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (1, 0)
    params = two_units(backend, *rows)
    with pytest.raises(sg.NonfiniteGradientError):
        made(params, nonfinite="raise").step()
    params = two_units(backend, *rows)
    assert params[0].grad is not None
    params[0].grad[1, 1] = 3.0
    taken = norms_taken(params, made(params, nonfinite="zero"))
    assert np.allclose(taken, [0.5, 0.5, 0.2, 1e-4])
    params = two_units(backend, *rows)
    taken = norms_taken(params, made(params, nonfinite="propagate"))
    assert np.allclose(taken, [0.5, math.nan, 0.2, 1e-4], equal_nan=True)
    # timm's formula treats each unit by itself.
    written = two_units(backend, *rows)
    expected = [
        as_timm_has_it(p.detach(), p.grad, sg.ClipAdaptive(0.1))
        for p in written
        if p.grad is not None
    ]
    made(written, nonfinite="propagate", write_grads=True).step()
    for param, want in zip(written, expected, strict=True):
        assert param.grad is not None
        assert torch.allclose(param.grad, want, equal_nan=True)


def test_a_skipped_step_changes_nothing(backend: Backend) -> None:
    params = units_of(backend.device)
    optimizer = sg.optim.AdamW(params, clip=sg.ClipAdaptive(), skip=sg.SkipSpikes(3, window=4))
    for scale in (1.0, 1.1, 0.9, 1.0):
        for param in params:
            param.grad = torch.full_like(param, scale)
        optimizer.step()
    before = copy.deepcopy((tensor_state(optimizer), [p.detach() for p in params]))
    for param in params:
        param.grad = torch.full_like(param, 1e3)
    optimizer.step()
    assert_same_tree((tensor_state(optimizer), [p.detach() for p in params]), before)
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (1, 4)


def test_gradients_under_a_loss_scale(backend: Backend) -> None:
    params = two_units(backend, 1.0, 0.4, 1.0, 1.0)
    optimizer = sg.optim.SGD(params, lr=1.0, clip=sg.ClipAdaptive(0.1, eps=0.5))
    optimizer.grad_scale = torch.tensor(8.0, device=backend.device)
    optimizer.found_inf = torch.tensor(0.0, device=backend.device)
    for param in params:
        assert param.grad is not None
        param.grad *= 8
    assert np.allclose(norms_taken(params, optimizer), [0.5, 0.4, 0.2, 0.05])


def test_large_and_small_numbers(backend: Backend) -> None:
    for dtype, sizes in ((torch.float64, (1e-300, 1e300)), (torch.float32, (1e-38, 1e38))):
        for size in sizes:
            param = Parameter(torch.full((3, 200), size, dtype=dtype, device=backend.device))
            param.grad = torch.full_like(param, size)
            before = param.detach().clone()
            sg.optim.SGD([param], lr=1.0, clip=sg.ClipAdaptive(0.01, eps=0.0)).step()
            assert torch.allclose(param, before * 0.99, rtol=1e-6, atol=0)


def test_launches_and_no_waiting(backend: Backend) -> None:
    device = asynchronous_device(backend)
    params = units_of(device)
    for ours, launches in (({"clip": sg.ClipAdaptive()}, 4), ({"max_norm": 1.0}, 3)):
        optimizer = sg.optim.AdamW(params, **ours)  # type: ignore[arg-type]
        for step in range(3):
            for param in params:
                param.grad = torch.full_like(param, 1.0 + step)
            before = _kernels.launch_count()
            with no_waiting(device):
                optimizer.step()
            if step > 0:
                assert _kernels.launch_count() - before == launches


def test_the_key_goes_with_the_optimizer(backend: Backend) -> None:
    params = two_units(backend, 1.0, 1.0, 1.0, 1.0)
    groups = [{"params": params[:1]}, {"params": params[1:], "clipping": None}]
    optimizer = sg.optim.SGD(groups, lr=1.0, clip=sg.ClipAdaptive(0.1))
    optimizer.step()
    saved = optimizer.state_dict()
    assert [g["clipping"] for g in saved["param_groups"]] == [0.1, None]
    assert saved["param_groups"][0]["clip_state"] == ["ClipAdaptive", 0]
    fresh = sg.optim.SGD(
        [{"params": g["params"]} for g in groups], lr=1.0, clip=sg.ClipAdaptive(0.3)
    )
    plain = [{"params": g["params"]} for g in groups]
    fresh.load_state_dict(torch.optim.SGD(plain, lr=1.0).state_dict())
    assert [g["clipping"] for g in fresh.param_groups] == [0.3, 0.3]
    with pytest.warns(
        UserWarning, match=r"clipping of param_groups\[0\]: loaded 0.1, asked for 0.3"
    ):
        fresh.load_state_dict(saved)
    assert [g["clipping"] for g in fresh.param_groups] == [0.1, None]
    copied = copy.deepcopy(fresh)
    assert copied._options.clip == sg.ClipAdaptive(0.3)
    torch.optim.SGD(groups, lr=1.0).load_state_dict(saved)
    assert "clipping" not in sg.optim.SGD(params, lr=1.0, max_norm=1.0).param_groups[0]


def test_no_number_limits_the_total_norm(backend: Backend) -> None:
    params = two_units(backend, 1.0, 1.0, 1.0, 1.0)
    optimizer = sg.optim.SGD(params, lr=1.0, clip=sg.ClipAdaptive())
    optimizer.step()
    stepper: Any = optimizer._stepper
    rows = stepper.policies._clip._rows
    assert rows.shape == (1, 2) and rows[0, 0] == 1 and rows[0, 1].isnan()


@pytest.mark.parametrize("value", [0, -0.01, math.nan, math.inf])
def test_impossible_numbers(value: float) -> None:
    with pytest.raises(ValueError, match=rf"ClipAdaptive: clipping: expected .*got {value!r}"):
        sg.ClipAdaptive(value)
    if value != 0:
        with pytest.raises(ValueError, match=rf"ClipAdaptive: eps: expected .*got {value!r}"):
            sg.ClipAdaptive(eps=value)
    for name in ("clipping", "eps"):
        with pytest.raises(TypeError, match=rf"ClipAdaptive: {name}: expected a finite number"):
            sg.ClipAdaptive(**{name: "much"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected clipping > 0 and eps >= 0"):
        reference.ClipAdaptive(-1.0)


def test_an_impossible_number_of_a_param_group(backend: Backend) -> None:
    params = two_units(backend, 1.0, 1.0, 1.0, 1.0)
    optimizer = sg.optim.SGD(params, lr=1.0, clip=sg.ClipAdaptive())
    optimizer.param_groups[0]["clipping"] = -1.0
    with pytest.raises(
        ValueError, match=r"step: param_groups\[0\]: clipping: expected a number >= 0, got -1\.0"
    ):
        optimizer.step()
