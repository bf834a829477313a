"""The wrapped optimizer's own step, called directly: it works, but warns that nothing was stabilized."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

import steadygrad as sg
from tests.optim import unfused
from tests.optim.optimizer_kinds import MAKERS, give
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import bits

WRAPPED = ["AdamW", "SGD", "in-place"]
MESSAGE = r"step: called on the optimizer that a steadygrad.Stabilizer wraps"
wrapped_kinds = pytest.mark.parametrize("kind", WRAPPED)


def made(kind: str) -> tuple[list[Parameter], Any]:
    params = dense_parameters()
    optimizer = MAKERS[kind](params, max_norm=1.0)
    give(params)
    return params, optimizer


@wrapped_kinds
def test_a_direct_step_warns_once_and_is_taken(kind: str) -> None:
    params, optimizer = made(kind)
    before = [bits(param) for param in params]
    with pytest.warns(UserWarning, match=f"{type(optimizer.optimizer).__name__}.{MESSAGE}") as all_:
        optimizer.optimizer.step()
        optimizer.optimizer.step()
    assert len(all_) == 1 and all_[0].filename == __file__
    assert any(not torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    assert optimizer.clipped_steps == 0


@wrapped_kinds
def test_a_warning_that_is_an_error_comes_before_the_update(kind: str) -> None:
    params, optimizer = made(kind)
    before = [bits(param) for param in params]
    with pytest.raises(UserWarning, match=MESSAGE):
        optimizer.optimizer.step()
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))


@wrapped_kinds
def test_the_wrappers_own_steps_are_silent(kind: str) -> None:
    params, optimizer = made(kind)
    optimizer.step()
    again = sg.Stabilizer(optimizer.optimizer, max_norm=0.5)  # beside the first
    copied, pickled = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    for each in (optimizer, again, optimizer, copied, pickled):
        give(params)
        each.step()
    give(params, element=float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for each in (copied, pickled):
        with pytest.warns(UserWarning, match=MESSAGE):
            each.optimizer.step()


def test_closures_and_results_go_through() -> None:
    weight = Parameter(torch.ones(2))

    def closure() -> torch.Tensor:
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer: Any = sg.Stabilizer(torch.optim.LBFGS([weight], lr=0.1, max_iter=1), max_norm=1.0)
    assert optimizer.step(closure).item() == 2.0
    with pytest.warns(UserWarning, match=rf"LBFGS.{MESSAGE}"):
        assert optimizer.optimizer.step(closure).item() < 2.0


@wrapped_kinds
def test_an_optimizer_whose_wrapper_is_gone_is_on_its_own(kind: str) -> None:
    _, optimizer = made(kind)
    inner = optimizer.optimizer
    del optimizer
    gc.collect()
    inner.step()
    gone = weakref.ref(inner)
    watching = weakref.ref(vars(inner)["step"])
    del inner
    gc.collect()
    assert gone() is None and watching() is None


@wrapped_kinds
@pytest.mark.parametrize("scheduled_first", [True, False])
def test_schedulers_of_the_wrapped_optimizer_go_on(kind: str, scheduled_first: bool) -> None:
    params = dense_parameters()
    inner = unfused.NAdam(params) if kind == "in-place" else unfused.optimizer_class(kind)(params)
    scheduler = lr_scheduler.StepLR(inner, 1) if scheduled_first else None
    optimizer = sg.Stabilizer(inner, max_norm=1.0)
    assert optimizer.path.startswith("in-place: no fused rule" if kind == "in-place" else "fused")
    scheduler = scheduler or lr_scheduler.StepLR(inner, 1)
    for _ in range(2):
        give(params)
        optimizer.step()
        scheduler.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inner.step()
        scheduler.step()
    assert [MESSAGE[:12] in str(each.message) for each in caught] == [True]


def test_a_step_that_somebody_replaced_stays_as_it_is() -> None:
    params = dense_parameters()
    inner: Any = torch.optim.AdamW(params)
    calls: list[int] = []
    inner.step = lambda closure=None: calls.append(1)
    optimizer = sg.Stabilizer(inner, max_norm=1.0)
    assert optimizer.path == "in-place: the step of this AdamW was replaced"
    give(params)
    optimizer.step()
    inner.step()
    assert calls == [1, 1]
    _, later = made("AdamW")
    original = later.optimizer.step
    later.optimizer.step = lambda closure=None: (calls.append(2), original())[1]
    give(later.param_groups[0]["params"])
    later.step()  # goes through both
    assert calls == [1, 1, 2] and later.path.startswith("in-place")


@pytest.mark.parametrize("name", sg.optim.__all__)
def test_wrapping_what_is_stabilized_says_what_to_do(name: str) -> None:
    weights = [Parameter(torch.zeros(2))]
    stabilized = getattr(sg.optim, name)(weights)
    with pytest.raises(ValueError, match="not stabilized yet") as refused:
        sg.Stabilizer(stabilized, max_norm=1.0)
    assert f"got a steadygrad.optim.{name}, whose own step is stabilized" in str(refused.value)
    assert f"or wrap torch.optim.{name}" in str(refused.value)
    wrapped = sg.Stabilizer(torch.optim.SGD(weights))
    with pytest.raises(ValueError, match=r"got a steadygrad\.Stabilizer around SGD: give that one"):
        sg.Stabilizer(wrapped)
