"""A learning rate that falls after bad steps and recovers, alone and over torch's schedulers."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import steadygrad as sg
from tests.backends import Backend
from tests.optim.optimizer_kinds import MAKERS


def made(backend: Backend, kind: str = "subclass", lr: Any = 0.5, **ours: Any) -> Any:
    params = [Parameter(torch.zeros(1, device=backend.device)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.25 * lr}]
    return MAKERS[kind](groups, lr=lr, **ours)


def step(
    optimizer: Any, scheduler: Any, bad: bool = False, norm: float = 1.0, **given: Any
) -> float:
    """Step optimizer and scheduler; return the rate of the first group."""
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.full_like(group["params"][0], math.nan if bad else norm)
    optimizer.step()
    scheduler.step(**given)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == [float(lr) for lr in scheduler.get_last_lr()]
    return rates[0]


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "subclass", "in-place"])
def test_it_falls_and_recovers(backend: Backend, kind: str) -> None:
    optimizer = made(backend, kind, lr=1.0)
    scheduler = sg.LRBackoff(optimizer, recovery_steps=4, every=1)
    assert isinstance(scheduler, LRScheduler)
    assert step(optimizer, scheduler) == 1.0
    assert step(optimizer, scheduler, bad=True) == 0.5
    assert optimizer.param_groups[1]["lr"] == 0.125
    rates = [step(optimizer, scheduler) for _ in range(6)]
    assert rates == pytest.approx([0.625, 0.75, 0.875, 1.0, 1.0, 1.0])
    assert step(optimizer, scheduler, bad=True) == 0.5
    assert step(optimizer, scheduler, bad=True) == pytest.approx(0.625 / 2)
    assert [step(optimizer, scheduler) for _ in range(5)][-2:] == [1.0, 1.0]


def test_it_does_not_fall_for_ever(backend: Backend) -> None:
    optimizer = made(backend, lr=1.0, telemetry=None)
    scheduler = sg.LRBackoff(optimizer, factor=0.1, min_factor=0.05, recovery_steps=1000, every=1)
    rates = [step(optimizer, scheduler, bad=True) for _ in range(20)]
    assert min(rates) == 0.05 == rates[-1]


SCHEDULERS = {
    "step": lambda o: StepLR(o, step_size=3, gamma=0.5),
    "exponential": lambda o: ExponentialLR(o, gamma=0.9),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=20),
    "sequential": lambda o: SequentialLR(
        o, [LinearLR(o, total_iters=5), ExponentialLR(o, gamma=0.9)], milestones=[5]
    ),
}


@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_over_another_scheduler(backend: Backend, name: str) -> None:
    optimizer, same = made(backend), made(backend)
    plain = SCHEDULERS[name](same)
    scheduler = sg.LRBackoff(
        optimizer, SCHEDULERS[name](optimizer), factor=0.25, recovery_steps=4, every=1
    )
    multipliers = [1, 1, 0.25, 0.4375, 0.625, 0.8125, 1, 1, 1, 1, 1, 1]
    for index, multiplier in enumerate(multipliers):
        expected = step(same, plain, bad=index == 2)
        assert step(optimizer, scheduler, bad=index == 2) == pytest.approx(multiplier * expected)


def test_over_one_that_looks_at_a_metric(backend: Backend) -> None:
    optimizer = made(backend, lr=1.0)
    inner = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    scheduler = sg.LRBackoff(optimizer, inner, recovery_steps=2, every=1)
    assert step(optimizer, scheduler, metrics=1.0) == 1.0
    assert step(optimizer, scheduler, bad=True, metrics=2.0) == pytest.approx(0.05)
    assert step(optimizer, scheduler, metrics=0.5) == pytest.approx(0.075)
    assert step(optimizer, scheduler, metrics=0.4) == pytest.approx(0.1)


def test_spikes_and_clips_are_bad_steps_too(backend: Backend) -> None:
    skipping = made(backend, lr=1.0, skip=sg.SkipSpikes(3, window=4))
    clipping = made(backend, lr=1.0, clip=sg.Damp(5.0))
    schedulers = [sg.LRBackoff(skipping, every=1), sg.LRBackoff(clipping, clipped=True, every=1)]
    deaf = made(backend, lr=1.0, clip=sg.Damp(5.0))
    for norm in (1.0, 1.1, 0.9, 1.0):
        for optimizer, scheduler in zip((skipping, clipping), schedulers, strict=True):
            assert step(optimizer, scheduler, norm=norm) == 1.0
    for optimizer, scheduler in zip((skipping, clipping), schedulers, strict=True):
        assert step(optimizer, scheduler, norm=50.0) == 0.5
    assert step(deaf, sg.LRBackoff(deaf, every=1), norm=50.0) == 1.0


def test_it_looks_now_and_then(backend: Backend) -> None:
    optimizer = made(backend, lr=1.0)
    scheduler = sg.LRBackoff(optimizer, every=4, recovery_steps=10**6)
    rates = [step(optimizer, scheduler, bad=index in (0, 1, 6)) for index in range(9)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25], abs=1e-5)


def test_the_default_waits_for_no_device(backend: Backend) -> None:
    optimizer = made(backend, lr=1.0)
    scheduler = sg.LRBackoff(optimizer, recovery_steps=10**6)
    rates = [step(optimizer, scheduler, bad=index == 0) for index in range(16)]
    first = rates.index(next(rate for rate in rates if rate < 1))
    assert first == (15 if backend.asynchronous else 0)


def test_rates_in_tensors_stay_where_they_are(backend: Backend) -> None:
    rate = torch.tensor(1.0, device=backend.device)
    optimizer = sg.optim.SGD([Parameter(torch.zeros(1, device=backend.device))], lr=rate)
    held = optimizer.param_groups[0]["lr"]
    scheduler = sg.LRBackoff(optimizer, ExponentialLR(optimizer, gamma=0.5), every=1)
    assert step(optimizer, scheduler) == 0.5
    assert step(optimizer, scheduler, bad=True) == 0.125
    assert optimizer.param_groups[0]["lr"] is held


def test_it_goes_on_from_a_state_dict(backend: Backend) -> None:
    def fresh() -> tuple[Any, Any]:
        optimizer = made(backend)
        inner = CosineAnnealingLR(optimizer, T_max=30)
        return optimizer, sg.LRBackoff(optimizer, inner, recovery_steps=7, every=2)

    bad = {3, 8, 9, 14}
    optimizer, scheduler = fresh()
    for index in range(10):
        step(optimizer, scheduler, bad=index in bad)
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, its_scheduler = fresh()
    resumed.load_state_dict(saved[0])
    its_scheduler.load_state_dict(saved[1])
    for index in range(10, 20):
        expected = step(optimizer, scheduler, bad=index in bad)
        assert step(resumed, its_scheduler, bad=index in bad) == expected
    alone = sg.LRBackoff(resumed)
    with pytest.raises(ValueError, match=r"LRBackoff\.load_state_dict: .*'scheduler'"):
        alone.load_state_dict(copy.deepcopy(saved[1]))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"factor": 0.0}, ValueError),
        ({"factor": 1.0}, ValueError),
        ({"factor": "half"}, TypeError),
        ({"recovery_steps": 0}, ValueError),
        ({"recovery_steps": 1.5}, TypeError),
        ({"min_factor": 0.0}, ValueError),
        ({"min_factor": 2.0}, ValueError),
        ({"every": 0}, ValueError),
    ],
    ids=str,
)
def test_impossible_arguments(given: dict[str, Any], error: type[Exception]) -> None:
    optimizer = sg.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
    (name,) = given
    with pytest.raises(error, match=f"LRBackoff: {name}: expected"):
        sg.LRBackoff(optimizer, **given)


def test_other_optimizers_and_schedulers() -> None:
    plain = torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(TypeError, match=r"LRBackoff: optimizer: expected a steadygrad\.Stab"):
        sg.LRBackoff(plain)
    ours = sg.Stabilizer(plain)
    sg.LRBackoff(ours, StepLR(plain, 1))  # a scheduler of the wrapped optimizer is accepted, too
    other = sg.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(
        ValueError, match="LRBackoff: scheduler: expected one of the same optimizer"
    ):
        sg.LRBackoff(ours, StepLR(other, 1))
    with pytest.raises(TypeError, match="LRBackoff: scheduler: expected one of torch"):
        sg.LRBackoff(ours, "cosine")  # type: ignore[arg-type]


@pytest.mark.parametrize("inner", [False, True], ids=["alone", "over a scheduler"])
def test_param_groups_may_come_and_go(backend: Backend, inner: bool) -> None:
    optimizer = made(backend, lr=1.0)
    scheduler = sg.LRBackoff(
        optimizer, ExponentialLR(optimizer, 0.5) if inner else None, recovery_steps=100, every=1
    )
    step(optimizer, scheduler, bad=True)
    added = Parameter(torch.zeros(1, device=backend.device))
    optimizer.add_param_group({"params": [added], "lr": 8.0})
    step(optimizer, scheduler, bad=True)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    factor, multiplier = 0.5 if inner else 1.0, scheduler.multiplier
    assert rates == pytest.approx(
        [factor**2 * multiplier, 0.25 * factor**2 * multiplier, 8.0 * factor * multiplier]
    )
    del optimizer.param_groups[0]
    step(optimizer, scheduler)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    multiplier = scheduler.multiplier
    assert rates == pytest.approx([0.25 * factor**3 * multiplier, 8.0 * factor**2 * multiplier])

    # A state that was saved with the present groups goes on with them.
    saved = copy.deepcopy(scheduler.state_dict()), copy.deepcopy(optimizer.state_dict())
    step(optimizer, scheduler)
    after = [float(group["lr"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[0])
    step(optimizer, scheduler)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(after)
