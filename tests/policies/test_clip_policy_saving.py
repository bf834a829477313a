"""How the state of a clip policy in Python is saved and restored, and where one that cannot be saved is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend


class Counting(sg.ClipPolicy):
    """Counts its calls."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def limits(self, norms: Tensor) -> float:
        self.calls += 1
        return 1e9


class Slotted(sg.ClipPolicy):
    """Keeps its state in slots, one of them private and one never filled."""

    __slots__ = ("__total", "calls", "never")

    def __init__(self) -> None:
        self.calls = 0
        self.__total = torch.zeros((), dtype=torch.float64)

    def limits(self, norms: Tensor) -> float:
        self.calls += 1
        self.__total += norms.cpu().sum()
        return 1e9

    @property
    def total(self) -> float:
        return self.__total.item()


class Trained(sg.ClipPolicy):
    """Keeps its state in a parameter."""

    def __init__(self) -> None:
        self.limit = Parameter(torch.ones(1, dtype=torch.float64))

    def limits(self, norms: Tensor) -> Tensor:
        self.limit.add_(1.0)
        return self.limit.detach().to(norms.device)


def fused(params: list[Parameter], **ours: Any) -> Any:
    return sg.optim.SGD(params, lr=0.1, **ours)


def wrapped(params: list[Parameter], **ours: Any) -> Any:
    return sg.Stabilizer(torch.optim.SGD(params, lr=0.1), **ours)


kinds = pytest.mark.parametrize("make", [fused, wrapped], ids=["optim", "wrapper"])


def params_on(device: torch.device) -> list[Parameter]:
    return [Parameter(torch.zeros(3, device=device))]


def run(optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()


def of_itself(optimizer: Any, fresh: dict[str, Any]) -> dict[str, Any]:
    return fresh


def of_torch(optimizer: Any, fresh: dict[str, Any]) -> dict[str, Any]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return torch.optim.SGD(params, lr=0.1).state_dict()


def of_another_policy(optimizer: Any, fresh: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state_dict()
    for group in state["param_groups"]:
        group["clip_state"] = ["Other", "{}"]
    return state


@kinds
@pytest.mark.parametrize("saved", [of_itself, of_torch, of_another_policy])
def test_a_checkpoint_without_its_state(backend: Backend, make: Any, saved: Any) -> None:
    policy = Counting(calls=10)
    optimizer = make(params_on(backend.device), clip=policy)
    fresh = optimizer.state_dict()
    for _ in range(2):
        run(optimizer, 5)
        optimizer.load_state_dict(saved(optimizer, fresh))
        run(optimizer, 1)
        assert policy.calls == 11
    before = optimizer.state_dict()
    run(optimizer, 2)
    optimizer.load_state_dict(before)
    run(optimizer, 1)
    assert policy.calls == 12


@kinds
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_and_knows_where_it_began(
    backend: Backend, make: Any, copied: Callable[[Any], Any]
) -> None:
    optimizer = make(params_on(backend.device), clip=Counting(calls=10))
    fresh = optimizer.state_dict()
    run(optimizer, 5)
    other = copied(copied(optimizer))
    run(other, 1)
    assert other._options.clip.calls == 16
    other.load_state_dict(fresh)
    run(other, 1)
    assert other._options.clip.calls == 11
    assert optimizer._options.clip.calls == 15


def test_a_policy_in_another_optimizer_begins_with_what_it_has() -> None:
    policy = Counting()
    cpu = torch.device("cpu")
    run(fused(params_on(cpu), clip=policy), 3)
    second = fused(params_on(cpu), clip=policy)
    fresh = second.state_dict()
    run(second, 2)
    second.load_state_dict(fresh)
    run(second, 1)
    assert policy.calls == 4


@kinds
def test_slots_are_saved(backend: Backend, make: Any) -> None:
    optimizer = make(params_on(backend.device), clip=Slotted())
    run(optimizer, 3)
    saved = optimizer.state_dict()
    policy = Slotted()
    second = make(params_on(backend.device), clip=policy)
    second.load_state_dict(saved)
    run(second, 1)
    assert policy.calls == 4
    assert policy.total == pytest.approx(4 * 3**0.5)
    assert set(policy.state_dict()) == {"calls", "_Slotted__total"}


@kinds
def test_a_parameter_is_loaded(make: Any) -> None:
    policy = Trained()
    held = policy.limit
    optimizer = make(params_on(torch.device("cpu")), clip=policy)
    run(optimizer, 1)
    saved = optimizer.state_dict()
    run(optimizer, 2)
    optimizer.load_state_dict(saved)
    run(optimizer, 1)
    assert policy.limit is held and held.item() == 3.0 and held.requires_grad


@kinds
def test_only_saving_needs_a_state_that_can_be_saved(backend: Backend, make: Any) -> None:
    policy: Any = Counting()
    optimizer = make(params_on(backend.device), clip=policy)
    run(optimizer, 2)
    saved = optimizer.state_dict()
    policy.calls = 7
    policy.schedule = len
    run(optimizer, 1)
    optimizer.add_param_group({"params": params_on(backend.device)})
    run(optimizer, 1)
    assert policy.calls == 9
    for save in (optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
        for _ in range(2):
            with pytest.raises(
                TypeError, match=r"Counting\.state_dict: state\['schedule'\]: expected a number"
            ):
                save()
    run(optimizer, 1)
    assert policy.calls == 10
    optimizer.load_state_dict(
        {
            **saved,
            "param_groups": saved["param_groups"] + [{**saved["param_groups"][0], "params": [1]}],
        }
    )
    run(optimizer, 1)
    assert policy.calls == 3
    del policy.schedule
    assert optimizer.state_dict()["param_groups"][0]["clip_state"] == ["Counting", '{"calls": 3}']


@pytest.mark.parametrize("clip", [Counting(), sg.ClipPercentile()], ids=["python", "kernel"])
def test_replaced_rows_are_kept_for_graphs_alone(backend: Backend, clip: Any) -> None:
    optimizer: Any = fused(params_on(backend.device), clip=clip, clip_scope="tensor")
    for _ in range(4):
        run(optimizer, 1)
        optimizer.add_param_group({"params": params_on(backend.device)})
    kept = optimizer._stepper.policies._clip._replaced
    assert bool(kept) == backend.asynchronous
