"""State from which no step could continue is refused when it is loaded, by the name of its key."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend
from tests.snapshots import Snapshot

ZSCORE: dict[str, Any] = {"clip": sg.ClipZScore()}
PERCENTILE: dict[str, Any] = {"clip": sg.ClipPercentile()}
BAD: dict[str, tuple[dict[str, Any], str, Any]] = {
    "count below zero": (ZSCORE, "clip_state", ["ClipZScore", -1]),
    "count of nan": (ZSCORE, "clip_state", ["ClipZScore", math.nan]),
    "no number": (ZSCORE, "clip_state", ["ClipZScore", 3, "1", 1.0, 1.0]),
    "negative number": (ZSCORE, "clip_state", ["ClipZScore", 3, 1.0, 1.0, -1.0]),
    "too few numbers": (PERCENTILE, "clip_state", ["ClipPercentile", 5, 0.0]),
    "endless": (PERCENTILE, "clip_state", ["ClipPercentile", math.inf]),
    "spikes": ({"skip": sg.SkipSpikes()}, "skip_state", ["SkipSpikes", -2, 1.0]),
    "counter of text": ({}, "skipped_steps", "3"),
    "negative counter": ({}, "clipped_steps", -1),
    "rounded steps": ({"rounding": "stochastic"}, "rounded_steps", 1.5),
    "recorded steps": ({"telemetry": "global"}, "recorded_steps", None),
}


class Limit(sg.ClipPolicy):
    """A policy whose state is a number and a tensor."""

    def __init__(self) -> None:
        self.limit = torch.ones(())

    def limits(self, norms: torch.Tensor) -> torch.Tensor:
        return self.limit.to(norms.device)


def made(backend: Backend, wrap: bool, options: dict[str, Any]) -> tuple[Parameter, Any]:
    param = Parameter(torch.ones(3, device=backend.device))
    param.grad = torch.ones(3, device=backend.device)
    if wrap:
        return param, sg.Stabilizer(torch.optim.SGD([param], lr=0.5, momentum=0.9), **options)
    return param, sg.optim.SGD([param], lr=0.5, momentum=0.9, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16], ids=str)
def test_a_loaded_step_counter_of_another_dtype_counts_on(
    backend: Backend, dtype: torch.dtype
) -> None:
    params = []
    for loaded in (torch.float32, dtype):
        param = Parameter(torch.ones(3, device=backend.device))
        param.grad = torch.tensor([3.0, -4.0, 0.5], device=backend.device)
        optimizer = sg.Stabilizer(torch.optim.AdamW([param], lr=0.5), max_norm=2.0)
        for _ in range(3):
            optimizer.step()
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["state"][0]["step"] = state_dict["state"][0]["step"].to(loaded)
        optimizer.load_state_dict(state_dict)
        for _ in range(2):
            optimizer.step()
        assert optimizer.state_dict()["state"][0]["step"] == 5
        params.append(param)
    assert torch.equal(*params)


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "subclass"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_state_is_refused_when_it_is_loaded(backend: Backend, kind: str, wrap: bool) -> None:
    options, key, bad = BAD[kind]
    param, optimizer = made(backend, wrap, options)
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0].update({key: bad, "lr": 7.0})
    snapshot = Snapshot([param], optimizer)
    with pytest.raises((TypeError, ValueError), match=key):
        optimizer.load_state_dict(state_dict)
    snapshot.assert_unchanged()
    optimizer.step()


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "negative counter"])
def test_bad_state_set_by_hand_is_refused_by_the_step(backend: Backend, kind: str) -> None:
    options, key, bad = BAD[kind]
    param, optimizer = made(backend, True, options)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0][key] = bad
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize(
    "text",
    [3, "{", "[1]", '{"limit": {"__tensor__": ["evil", [1], [1]]}}', '{"a": {"__tensor__": 1}}'],
)
def test_a_python_policys_text_is_checked(backend: Backend, text: Any) -> None:
    _, optimizer = made(backend, False, {"clip": Limit()})
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["clip_state"] = ["Limit", text]
    with pytest.raises(ValueError, match="clip_state"):
        optimizer.load_state_dict(state_dict)
    optimizer.step()


@pytest.mark.parametrize(
    ("key", "bad"),
    [("scale", -1.0), ("scale", "x"), ("_growth_tracker", -2), ("growth_interval", 1.5)],
)
def test_a_scalers_numbers_are_checked(key: str, bad: Any) -> None:
    scaler = sg.GradScaler("cpu")
    good = scaler.state_dict()
    with pytest.raises((TypeError, ValueError), match=key):
        scaler.load_state_dict({**good, key: bad})
    assert scaler.state_dict() == good


@pytest.mark.parametrize(
    ("key", "bad"), [("multiplier", "x"), ("_since", -1), ("recovery_steps", 0), ("_seen", None)]
)
def test_a_backoffs_numbers_are_checked(key: str, bad: Any) -> None:
    scheduler = sg.LRBackoff(sg.optim.SGD([Parameter(torch.ones(2))], lr=0.1))
    good = scheduler.state_dict()
    with pytest.raises((TypeError, ValueError), match=key):
        scheduler.load_state_dict({**good, key: bad})
    assert scheduler.state_dict() == good
