"""Checks that the functions return ordinary tensors, whatever mode or default is in force."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend

FUNCTIONS: dict[str, Callable[[list[Parameter]], Tensor]] = {
    "get_total_norm": lambda ps: sg.get_total_norm([p.grad for p in ps]),  # type: ignore[misc]
    "get_total_norm of nothing": lambda ps: sg.get_total_norm([]),
    "clip_grad_norm_": lambda ps: sg.clip_grad_norm_(ps, 1.0),
    "add_penalty_": lambda ps: sg.add_penalty_(ps, 0.1),
}


def parameters(backend: Backend) -> list[Parameter]:
    params = [Parameter(torch.full((4,), 2.0, device=backend.device)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_is_no_view_and_takes_part_in_autograd(backend: Backend, function: str) -> None:
    factor = torch.tensor(3.0, device=backend.device, requires_grad=True)
    with torch.no_grad():
        result = FUNCTIONS[function](parameters(backend))
    value = result.item()
    assert not result._is_view()
    result.detach_()
    result *= factor
    result.backward()
    assert factor.grad is not None and factor.grad.item() == pytest.approx(value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fake_memory_is_never_written(backend: Backend, function: str) -> None:
    params = parameters(backend)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            FUNCTIONS[function](params)
        except TypeError as error:
            assert backend.asynchronous
            assert re.search("expected (torch.empty to give memory|a torch.Tensor)", str(error))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_default_device_is_not_taken_for_the_tensors_device(
    backend: Backend, function: str
) -> None:
    params = parameters(backend)
    want = FUNCTIONS[function](parameters(backend))
    with torch.device("meta"):
        got = FUNCTIONS[function](params)
    assert got.device == want.device and torch.equal(got, want)


def test_a_default_device_is_not_taken_for_the_steps(backend: Backend) -> None:
    params = parameters(backend)
    with torch.device("meta"):
        optimizer = sg.optim.AdamW(params, max_norm=1.0)
        optimizer.step()
        norm = optimizer.grad_norm
    assert norm is not None and norm.item() == pytest.approx(12**0.5)
    assert optimizer.state[params[0]]["step"].item() == 1


def test_reading_a_norm_gives_one_of_its_own(backend: Backend) -> None:
    optimizer = sg.optim.AdamW(parameters(backend), max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    optimizer.grad_norm.mul_(100)
    assert optimizer.grad_norm.item() == pytest.approx(12**0.5)


@pytest.mark.kernels
def test_counters_may_be_read_while_another_thread_steps(backend: Backend) -> None:
    optimizer = sg.optim.SGD(parameters(backend), 0.0, max_norm=0.1)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            assert optimizer.clipped_steps <= 100

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(100):
        optimizer.step()
    done.set()
    for reader in readers:
        reader.join()
    assert optimizer.clipped_steps == 100


def test_two_wrappers_of_one_optimizer_take_turns(backend: Backend) -> None:
    results = []
    for other in (False, True):
        params = parameters(backend)
        inner = torch.optim.SGD(params, 0.1, momentum=0.9, dampening=0.5)
        first = sg.Stabilizer(inner, max_norm=1.0)
        second = sg.Stabilizer(inner, max_norm=1.0) if other else first
        assert params[0].grad is not None
        params[0].grad[0] = torch.nan
        first.step()  # skipped, so that the next one is SGD's first, which is not dampened
        params[0].grad[0] = 1.0
        second.step()
        second.step()
        assert (first.skipped_steps, second.clipped_steps) == (1, 2)
        results.append(torch.stack([p.detach() for p in params]))
    assert torch.equal(*results)
