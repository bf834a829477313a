"""A model and its optimizer are freed with the last reference, without the cycle collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadygrad as sg
from tests.backends import Backend
from tests.optim.optimizer_kinds import MAKERS

EVERYTHING: dict[str, Any] = {"clip": sg.ClipZScore(), "skip": sg.SkipSpikes()}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    # torch's first step in a process leaves a reference cycle of its own.
    model = nn.Linear(3, 2)
    plain(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gc.disable()
    yield
    gc.enable()


def backward(model: nn.Module, scale: float = 1.0) -> Tensor:
    param = next(model.parameters())
    inputs = torch.ones(2, 3, dtype=param.dtype, device=param.device)
    loss: Tensor = model(inputs).square().mean() * scale
    loss.backward()
    return loss


def plain(model: nn.Module, opt: Any) -> None:
    backward(model)
    opt.step()


def hooks(model: nn.Module, opt: Any) -> None:
    opt.register_step_pre_hook(lambda optimizer, args, kwargs: None)
    opt.register_step_post_hook(lambda optimizer, args, kwargs: None)
    plain(model, opt)


def closure(model: nn.Module, opt: Any) -> None:
    opt.step(lambda: backward(model))


def skipped(model: nn.Module, opt: Any) -> None:
    backward(model, float("nan"))
    opt.step()
    plain(model, opt)


def saved(model: nn.Module, opt: Any) -> None:
    plain(model, opt)
    opt.load_state_dict(opt.state_dict())
    plain(model, opt)


def read(model: nn.Module, opt: Any) -> None:
    plain(model, opt)
    str(opt.report()), opt.telemetry, opt.grad_norm, opt.skipped_steps, opt.path


def scheduled(model: nn.Module, opt: Any) -> None:
    scheduler = sg.LRBackoff(opt, torch.optim.lr_scheduler.StepLR(opt, 2))
    plain(model, opt)
    scheduler.step()


def scaled(model: nn.Module, opt: Any) -> None:
    device = next(model.parameters()).device.type
    for scaler in (sg.GradScaler("cpu"), torch.amp.GradScaler("cpu")) if device == "cpu" else ():
        backward(model, float(scaler.scale(torch.ones(()))))
        scaler.step(opt)
        scaler.update()


def accumulated(model: nn.Module, opt: Any) -> None:
    with sg.accumulate(opt):
        backward(model)
    opt.step()


USES = [plain, hooks, closure, skipped, saved, read, scheduled, scaled, accumulated]


def left(use: Callable[[nn.Module, Any], None], kind: str, backend: Backend, **ours: Any) -> int:
    model = nn.Linear(3, 2).to(backend.device)
    optimizer = MAKERS[kind](model.parameters(), **ours)
    use(model, optimizer)
    there = [weakref.ref(thing) for thing in (optimizer, *model.parameters())]
    del model, optimizer
    return sum(thing() is not None for thing in there)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("kind", ["AdamW", "subclass", "in-place"])
def test_nothing_is_left(use: Any, kind: str, backend: Backend) -> None:
    assert left(use, kind, backend, **EVERYTHING) == 0
    assert left(use, kind, backend, telemetry="global", max_norm=1.0) == 0


@pytest.mark.parametrize("kind", ["AdamW", "in-place"])
def test_the_wrapped_optimizer_outlives_its_wrapper(kind: str) -> None:
    model = nn.Linear(3, 2)
    wrapper = MAKERS[kind](model.parameters(), max_norm=1.0)
    wrapped = wrapper.optimizer
    plain(model, wrapper)
    del wrapper
    again = sg.Stabilizer(wrapped, max_norm=1.0)
    plain(model, again)
    assert again.clipped_steps + again.skipped_steps >= 0 and again.has_stepped
