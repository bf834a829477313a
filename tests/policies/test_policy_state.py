"""What policies have learnt survives every way to save and copy an optimizer."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend
from tests.optim.optimizer_kinds import MAKERS, make_twin
from tests.optim.optimizer_runs import tensor_state
from tests.policies.policy_runs import CLIPS, recorded_norms
from tests.snapshots import assert_same_tree

NORMS = recorded_norms(90)
HALF = 60
KINDS = ["AdamW", "SGD", "subclass", "in-place"]
all_kinds = pytest.mark.parametrize("kind", KINDS)
SAVED = ["percentile-window", "zscore", "relative-short"]
all_clips = pytest.mark.parametrize("name", SAVED)


def policies(name: str) -> dict[str, Any]:
    return {"clip": CLIPS[name].policy(), "skip": sg.SkipSpikes(4.0, window=16)}


def model_on(device: torch.device) -> nn.Linear:
    model = nn.Linear(1, 2).to(device)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.5)
    return model


def run(model: nn.Module, optimizer: Any, norms: list[float]) -> None:
    for norm in norms:
        for share, param in zip((0.6, 0.8), model.parameters(), strict=True):
            param.grad = torch.zeros_like(param)
            param.grad.view(-1)[0] = norm * share
        optimizer.step()


def half_way(kind: str, device: torch.device, **ours: Any) -> tuple[nn.Linear, Any]:
    model = model_on(device)
    optimizer = MAKERS[kind](list(model.parameters()), **ours)
    run(model, optimizer, NORMS[:HALF])
    return model, optimizer


def by_state_dict(kind: str, model: nn.Linear, optimizer: Any, ours: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh = MAKERS[kind](list(model.parameters()), **ours)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


def by_pickle(kind: str, model: nn.Linear, optimizer: Any, ours: dict[str, Any]) -> Any:
    restored = pickle.loads(pickle.dumps((model, optimizer)))
    model.__dict__.update(restored[0].__dict__)
    return restored[1]


def by_deepcopy(kind: str, model: nn.Linear, optimizer: Any, ours: dict[str, Any]) -> Any:
    copied = copy.deepcopy((model, optimizer))
    model.__dict__.update(copied[0].__dict__)
    return copied[1]


def by_distributed_checkpoint(flat: bool) -> Callable[..., Any]:
    def move(kind: str, model: nn.Linear, optimizer: Any, ours: dict[str, Any]) -> Any:
        optimizer.zero_grad()  # if there were gradients, torch would make no state to load into
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        fresh = MAKERS[kind](list(model.parameters()), **ours)
        set_optimizer_state_dict(model, fresh, optim_state_dict=saved, options=options)
        return fresh

    return move


WAYS: dict[str, Callable[..., Any]] = {
    "state_dict": by_state_dict,
    "pickle": by_pickle,
    "deepcopy": by_deepcopy,
    "distributed": by_distributed_checkpoint(False),
    "distributed-flat": by_distributed_checkpoint(True),
}


@cache
def without_a_move(backend: Backend, name: str, kind: str) -> tuple[nn.Linear, Any]:
    """Return the model and the optimizer of a run that nothing interrupts."""
    model, optimizer = half_way(kind, backend.device, **policies(name))
    run(model, optimizer, NORMS[HALF:])
    return model, optimizer


@pytest.mark.parametrize("way", WAYS)
@all_kinds
@all_clips
def test_it_goes_on_as_if_nothing_had_happened(
    backend: Backend, name: str, kind: str, way: str
) -> None:
    ours = policies(name)
    model, optimizer = half_way(kind, backend.device, **ours)
    moved = WAYS[way](kind, model, optimizer, ours)
    run(model, moved, NORMS[HALF:])
    expected_model, expected = without_a_move(backend, name, kind)
    assert_same_tree(tensor_state(moved), tensor_state(expected))
    groups, expected_groups = (o.state_dict()["param_groups"] for o in (moved, expected))
    for group in [*groups, *expected_groups] if backend.asynchronous else []:
        # A step that makes state for a checkpoint is recorded, since nothing waits to see that its gradients are 0.
        del group["recorded_steps"]
    assert groups == expected_groups
    assert_same_tree(dict(model.state_dict()), dict(expected_model.state_dict()))
    assert moved.skipped_steps == expected.skipped_steps > 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["AdamW", "subclass"])
def test_through_files_of_a_distributed_checkpoint(
    backend: Backend, kind: str, tmp_path: Path
) -> None:
    ours = policies("percentile-window")
    model, optimizer = half_way(kind, backend.device, **ours)
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    fresh = MAKERS[kind](list(model.parameters()), **ours)
    template = {"optimizer": get_optimizer_state_dict(model, fresh)}
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(model, fresh, optim_state_dict=template["optimizer"])
    assert_same_tree(tensor_state(fresh), tensor_state(optimizer))
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    run(model, fresh, NORMS[HALF:])
    assert fresh.state_dict()["param_groups"] != optimizer.state_dict()["param_groups"]


@all_clips
def test_the_same_optimizer_goes_back(backend: Backend, name: str) -> None:
    model, optimizer = half_way("SGD", backend.device, **policies(name))
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        run(model, optimizer, NORMS[HALF:])
        later = copy.deepcopy(optimizer.state_dict()["param_groups"])
        assert later != saved["param_groups"]
        optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
    run(model, optimizer, NORMS[HALF:])
    assert optimizer.state_dict()["param_groups"] == later


def test_what_is_saved_is_plain(backend: Backend) -> None:
    _, optimizer = half_way("AdamW", backend.device, **policies("percentile-window"))
    for group in optimizer.state_dict()["param_groups"]:
        for key in ("clip_state", "skip_state"):
            assert json.loads(json.dumps(group[key])) == group[key]
    assert len(optimizer.state_dict()["param_groups"][0]["clip_state"]) == 1 + 1 + 1 + 50


@all_kinds
def test_a_checkpoint_from_before_there_was_a_policy(backend: Backend, kind: str) -> None:
    model, optimizer = half_way(kind, backend.device, **policies("zscore"))
    twin = make_twin(kind, list(model_on(backend.device).parameters()))
    optimizer.load_state_dict(twin.state_dict())
    group = optimizer.state_dict()["param_groups"][0]
    assert group["clip_state"] in (None, ["ClipZScore", 0])
    run(model, optimizer, NORMS[:3])
    assert optimizer.state_dict()["param_groups"][0]["clip_state"][2] == 3.0


@all_kinds
def test_torch_takes_ours(backend: Backend, kind: str) -> None:
    model, optimizer = half_way(kind, backend.device, **policies("zscore"))
    twin = make_twin(kind, list(model.parameters()))
    twin.load_state_dict(optimizer.state_dict())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    twin.step()


def test_another_policy_begins_anew(backend: Backend) -> None:
    params = [Parameter(torch.zeros(1, device=backend.device))]
    inner = torch.optim.SGD(params, lr=1.0)

    def learnt(clip: Any) -> Any:
        wrapper = sg.Stabilizer(inner, clip=clip)
        params[0].grad = torch.ones_like(params[0])
        wrapper.step()
        return wrapper.state_dict()["param_groups"][0]["clip_state"]

    assert learnt(sg.ClipPercentile(window=4)) == ["ClipPercentile", 2, 1.0, 1.0]
    assert learnt(sg.ClipPercentile(window=4)) == ["ClipPercentile", 3, 2.0, 1.0, 1.0]
    assert learnt(sg.ClipPercentile(window=5)) == ["ClipPercentile", 4, 3.0, 1.0, 1.0, 1.0]
    assert learnt(sg.ClipPercentile(window=2)) == ["ClipPercentile", 2, 1.0, 1.0]
    assert learnt(sg.ClipZScore())[:3] == ["ClipZScore", 3, 1.0]


def test_a_new_parameter_begins_and_the_others_go_on(backend: Backend) -> None:
    params = [Parameter(torch.zeros(1, device=backend.device)) for _ in range(3)]
    optimizer = sg.optim.SGD(params[:2], lr=1.0, clip=sg.ClipRelative())
    for count in (2, 3):
        if count == 3:
            optimizer.add_param_group({"params": [params[2]]})
        for param in params[:count]:
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()
    saved = optimizer.state_dict()["param_groups"]
    assert saved[0]["clip_state"] == ["ClipRelative", 2, 2.0, 0.5, 2, 2.0, 0.5, 2, 1.0, 0.5]
    assert saved[1]["clip_state"] == saved[0]["clip_state"]


def test_reading_a_counter_does_not_save(backend: Backend) -> None:
    _, optimizer = half_way("SGD", backend.device, **policies("percentile"))
    assert optimizer.skipped_steps > 0
    assert optimizer.param_groups[0]["clip_state"] is None


def test_printing_an_optimizer_shows_no_history(backend: Backend) -> None:
    model, optimizer = half_way("SGD", backend.device, **policies("percentile-window"))
    saved = [optimizer.state_dict() for _ in range(2)]
    assert saved[0]["param_groups"] == saved[1]["param_groups"]
    assert len(saved[0]["param_groups"][0]["clip_state"]) > 50
    assert "clip_state: None" in repr(optimizer)
    run(model, optimizer, NORMS[HALF:])
    optimizer.load_state_dict(saved[0])
    assert optimizer.state_dict()["param_groups"] == saved[0]["param_groups"]
    fresh = MAKERS["SGD"](list(model.parameters()), **policies("percentile-window"))
    optimizer.load_state_dict(fresh.state_dict())
    assert optimizer.state_dict()["param_groups"][0]["clip_state"] in (None, ["ClipPercentile", 0])
