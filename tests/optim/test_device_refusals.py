"""Tensors and numbers on the wrong device are refused in words, or handled correctly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from steadygrad import _kernels
from steadygrad.memory import Outcome, allocator
from steadygrad.optim.options import StabilizerOptions
from tests.backends import BACKENDS, Backend
from tests.optim.device_twins import asynchronous_device
from tests.optim.optimizer_kinds import MAKERS, give
from tests.optim.parameter_sets import dense_parameters, with_gradients
from tests.snapshots import Snapshot, assert_refused, bits
from tests.tolerances import assert_close

REFUSALS = (TypeError, ValueError, RuntimeError)
HOST = torch.device("cpu")
on_gpu = pytest.mark.parametrize("backend", BACKENDS[2:], ids=str, indirect=True)

FUNCTIONS: dict[str, Callable[[list[Parameter]], object]] = {
    "get_total_norm": lambda ps: sg.get_total_norm([p.grad for p in ps]),  # type: ignore[misc]
    "clip_grad_norm_": lambda ps: sg.clip_grad_norm_(ps, 1.0),
    "clip_grads_with_norm_": lambda ps: sg.clip_grads_with_norm_(ps, 1.0, 9.0),
    "clip_grad_value_": lambda ps: sg.clip_grad_value_(ps, 1.0),
    "add_penalty_": lambda ps: sg.add_penalty_(ps, 0.5, 0.5),
    "soft_threshold_": lambda ps: sg.soft_threshold_(ps, 0.5),
}


def params_on(*devices: torch.device) -> list[Parameter]:
    return with_gradients([torch.full((9,), 50.0, device=device) for device in devices])


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "subclass"])
@pytest.mark.parametrize("number", ["lr", "grad_scale", "found_inf"])
def test_a_number_on_a_device_that_has_none(backend: Backend, kind: str, number: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    give(params)
    snapshot = Snapshot(params)
    nowhere = torch.ones((), device="meta")
    if number == "lr":
        optimizer.param_groups[0]["lr"] = nowhere
    else:
        setattr(optimizer, number, nowhere)
    assert_refused(
        optimizer.step,
        REFUSALS,
        function="step",
        argument=number,
        expected="expected.*number",
        got="got.*meta",
        unchanged=[snapshot],
    )


@pytest.mark.parametrize(
    "norm",
    [torch.ones(2), torch.ones(0), torch.ones((), device="meta")],
    ids=["vector", "empty", "meta"],
)
def test_a_total_norm_that_is_no_number(backend: Backend, norm: Tensor) -> None:
    params = params_on(backend.device, backend.device)
    norm = norm if norm.is_meta else norm.to(backend.device)
    assert_refused(
        lambda: sg.clip_grads_with_norm_(params, 1.0, norm),
        REFUSALS,
        function="clip_grads_with_norm_",
        argument="total_norm",
        expected="expected.*number",
        got="got",
        unchanged=[Snapshot(params)],
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
def test_a_total_norm_of_any_dtype(
    backend: Backend, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # torch's own get_total_norm returns the gradients' dtype.
    mine, theirs = params_on(backend.device), params_on(backend.device)
    norm = torch.full(shape, 8, dtype=dtype, device=backend.device)
    sg.clip_grads_with_norm_(mine, 1.0, norm)
    torch.nn.utils.clip_grads_with_norm_(theirs, 1.0, norm.double().reshape(()))
    assert_close(mine[0].grad, theirs[0].grad, torch.float32)


# -- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq"])
def test_state_on_another_device(backend: Backend, state: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS["AdamW"](params, max_norm=1.0)
    for seed in range(2):
        give(params, seed)
        optimizer.step()
    kept = optimizer.state[params[1]][state]
    optimizer.state[params[1]][state] = kept.to("meta")
    assert_refused(
        optimizer.step,
        REFUSALS,
        function="step",
        argument=r"parameters\[1\]",
        expected="expected",
        got="got.*meta",
        unchanged=[Snapshot(params)],
    )
    optimizer.state[params[1]][state] = kept
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 3


@pytest.mark.parametrize("rule", ["none", "sgd"])
def test_a_gradient_on_another_device_than_its_parameter(backend: Backend, rule: str) -> None:
    # torch does not allow such a gradient to be assigned, so it is passed to the kernels directly.
    device = asynchronous_device(backend)
    params = params_on(device, device)
    options = StabilizerOptions(l2=0.1)
    groups = torch.optim.SGD(params, lr=0.1).param_groups
    plan = _kernels.Plan(
        rule,
        rule != "none",
        groups,
        [_kernels.Slot(states=[], numbers=[], extra=None, first=False)] * 2,
        options.kernel_options(),
        options.limits(),
        device,
    )
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    memory = _kernels.DeviceMemory(
        outcome=Outcome(device).record,
        taken=torch.zeros(2, dtype=torch.int32, device=device),
        counts=counts,
        allocate=allocator(device),
    )
    grads = [params[0].grad, torch.ones(9, device="meta")]
    assert_refused(
        lambda: plan.step(groups, {}, grads=grads, memory=memory),
        TypeError,
        function="step",
        argument=r"parameters\[1\]\.grad",
        expected="expected a.* tensor on",
        got="got.*meta",
        unchanged=[Snapshot(params)],
    )
    assert not counts.any()


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_parameter_elsewhere_without_a_gradient_takes_no_part(
    backend: Backend, kind: str, place: int
) -> None:
    if kind == "Adagrad":
        pytest.skip("torch makes its state when it is constructed")

    def run(elsewhere: bool) -> tuple[Any, list[Parameter]]:
        params = dense_parameters(device=backend.device)
        listed = list(params)
        if elsewhere:
            listed.insert(place, Parameter(torch.ones(3, device="meta")))
        optimizer = MAKERS[kind](listed, max_norm=1.0)
        for seed, element in enumerate([None, math.nan, None]):
            give(params, seed, element)
            optimizer.step()
        return optimizer, params

    (ours, mine), (same, expected) = run(True), run(False)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(mine, expected, strict=True))
    assert (ours.skipped_steps, ours.clipped_steps) == (1, 2)
    assert ours.path == same.path
    assert torch.equal(ours.grad_norm, same.grad_norm)


# -- with a GPU -----------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("first_on_host", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_refuse_tensors_of_two_devices(
    backend: Backend, function: str, first_on_host: bool
) -> None:
    devices = [backend.device, HOST]
    params = params_on(*(reversed(devices) if first_on_host else devices))
    assert_refused(
        lambda: FUNCTIONS[function](params),
        TypeError,
        function=function,
        argument=r"\[1\]",
        expected="expected a tensor on (the CPU|cuda:0), as the tensors before it",
        got=f"got.*device {'cuda' if first_on_host else 'cpu'}",
        unchanged=[Snapshot(params)],
    )


@on_gpu
@pytest.mark.parametrize("first_on_host", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_steps_refuse_parameters_of_two_devices(
    backend: Backend, kind: str, first_on_host: bool
) -> None:
    devices = [backend.device, HOST]
    params = params_on(*(reversed(devices) if first_on_host else devices))
    optimizer = MAKERS[kind](params, max_norm=1.0)
    assert_refused(
        optimizer.step,
        TypeError,
        function="step",
        argument=r"parameters\[1\]",
        expected="expected a tensor on (the CPU|cuda:0), as the tensors before it",
        got=f"got.*device {'cuda' if first_on_host else 'cpu'}",
        unchanged=[Snapshot(params)],
    )


@on_gpu
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "subclass"])
def test_a_gradient_that_stayed_on_the_host(backend: Backend, kind: str) -> None:
    params = params_on(backend.device, HOST)
    params[1].data = params[1].data.to(backend.device)
    assert params[1].grad is not None and params[1].grad.device == HOST
    optimizer = MAKERS[kind](params, max_norm=1.0)
    assert_refused(
        optimizer.step,
        TypeError,
        function="step",
        argument=r"parameters\[1\]",
        expected="expected a.* tensor on",
        got="got.*device (cpu|cuda)",
        unchanged=[Snapshot(params)],
    )
    with pytest.raises(TypeError, match=r"add_penalty_: params\[1\].*expected a tensor on"):
        sg.add_penalty_(params, 0.5, 0.5)


@on_gpu
def test_state_on_the_host_is_refused_and_step_counters_follow(backend: Backend) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS["AdamW"](params, max_norm=1.0)
    give(params)
    optimizer.step()
    state = optimizer.state[params[1]]
    kept, state["exp_avg"] = state["exp_avg"], state["exp_avg"].cpu()
    with pytest.raises(TypeError, match=r"parameters\[1\] state: expected a tensor on cuda"):
        optimizer.step()
    state["exp_avg"], state["step"] = kept, state["step"].cpu()
    optimizer.step()
    assert optimizer.state[params[1]]["step"].is_cuda
    assert [s["step"].item() for s in optimizer.state.values()] == [2.0] * len(params)


@on_gpu
def test_numbers_of_the_host_are_taken_as_numbers(backend: Backend) -> None:
    params, same = (dense_parameters(device=backend.device) for _ in range(2))
    optimizers = [MAKERS["AdamW"](some, max_norm=1.0) for some in (params, same)]
    for some in (params, same):
        give(some)
    for optimizer, where in zip(optimizers, (HOST, backend.device), strict=True):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device=where)
        optimizer.grad_scale = torch.tensor(4.0, device=where)
        optimizer.found_inf = torch.tensor(0.0, device=where)
        optimizer.step()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(params, same, strict=True))
    for some, where in ((params, HOST), (same, backend.device)):
        sg.clip_grads_with_norm_(some, 1.0, torch.tensor(3.0, device=where))
    for a, b in zip(params, same, strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(bits(a.grad), bits(b.grad))


@on_gpu
def test_tensors_of_two_gpus_are_refused(backend: Backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    params = params_on(torch.device("cuda:0"), torch.device("cuda:1"))
    for name, call in FUNCTIONS.items():
        with pytest.raises(TypeError, match=rf"{name}.*\[1\].*expected a tensor on cuda:0"):
            call(params)
    with pytest.raises(TypeError, match=r"step: parameters\[1\].*expected a tensor on cuda:0"):
        MAKERS["AdamW"](params, max_norm=1.0).step()
