"""The warning when step after step is skipped."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend
from tests.optim.optimizer_kinds import MAKERS

NOT_FINITE = "the gradient of 'second' is not finite (2 elements), first at step {first}."


def made(backend: Backend, kind: str = "subclass", **ours: Any) -> tuple[list[Parameter], Any]:
    params = [Parameter(torch.zeros(3, device=backend.device)) for _ in range(2)]
    named = zip(("first", "second"), params, strict=True)
    return params, MAKERS[kind](named, **ours)


def run(params: list[Parameter], opt: Any, steps: int, value: float = math.nan) -> list[str]:
    """Step with two such elements in the second gradient; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for param in params:
                param.grad = torch.ones_like(param)
            params[1].grad[1:] = value
            opt.step()
    assert all(warning.category is RuntimeWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("kind", ["AdamW", "subclass", "in-place"])
def test_twenty_in_a_row_are_said_once(backend: Backend, kind: str) -> None:
    every = {} if backend.name == "cpu" else {"telemetry": sg.Telemetry(every=1)}
    params, opt = made(backend, kind, **every)
    assert run(params, opt, 3, value=1.0) == run(params, opt, 19) == []
    (message,) = run(params, opt, 5)
    assert message.startswith("step: 20 steps in a row were skipped: ")
    assert NOT_FINITE.format(first=3) in message
    assert run(params, opt, 100) == []
    # A second series of skipped steps gets a second warning.
    assert run(params, opt, 1, value=1.0) == []
    assert NOT_FINITE.format(first=128) in run(params, opt, 20)[0]


def test_without_settings_a_device_is_looked_at_every_50_steps(backend: Backend) -> None:
    params, opt = made(backend)
    warned = run(params, opt, 150)
    assert len(warned) == 1 and NOT_FINITE.format(first=0) in warned[0]


def test_what_is_said_is_chosen(backend: Backend) -> None:
    for telemetry in (None, sg.Telemetry(warn_after_skips=None, every=1)):
        params, opt = made(backend, telemetry=telemetry)
        assert run(params, opt, 60) == []
    params, opt = made(backend, telemetry=sg.Telemetry(warn_after_skips=2, every=1, history=2))
    assert len(run(params, opt, 9)) == 1
    params, opt = made(backend, telemetry=sg.Telemetry(level="global", warn_after_skips=2, every=1))
    assert "telemetry='tensor' would say of which parameter" in run(params, opt, 9)[0]


def test_spikes_and_found_inf_are_named(backend: Backend) -> None:
    # The series has one step, since the policy learns that such norms occur.
    telemetry = sg.Telemetry(warn_after_skips=1, every=1)
    params, opt = made(backend, skip=sg.SkipSpikes(window=8), telemetry=telemetry)
    run(params, opt, 30, value=1.0)
    assert "their norms are spikes, 1" in run(params, opt, 9, value=1e5)[0]
    params, opt = made(backend, telemetry=sg.Telemetry(warn_after_skips=2, every=1))
    warned = []
    for _ in range(9):
        opt.grad_scale = torch.ones((), device=backend.device)
        opt.found_inf = torch.ones((), device=backend.device)
        warned += run(params, opt, 1, value=1.0)
    assert len(warned) == 1 and "found_inf" in warned[0]


def test_a_warning_made_an_error_leaves_a_decided_step() -> None:
    model = nn.Linear(2, 2)
    opt = sg.optim.SGD(model.parameters(), lr=0.1, telemetry=sg.Telemetry(warn_after_skips=1))
    for param in model.parameters():
        param.grad = torch.full_like(param, math.inf)
    with pytest.raises(RuntimeWarning, match="1 steps in a row were skipped"):
        opt.step()
    assert opt.skipped_steps == 1
    opt.step()  # there was a warning already
    assert opt.skipped_steps == 2
