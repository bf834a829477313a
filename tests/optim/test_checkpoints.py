"""Checkpoints both ways: torch's, our keys, half precision, distributed (points 9 to 11)."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import steadygrad as sg
from steadygrad.reference.rules import adam
from tests.backends import Backend
from tests.optim.optimizer_kinds import MAKERS, WITH_STATE, give, make_twin
from tests.optim.optimizer_runs import assert_same_params, assert_same_state, tensor_state
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import assert_same_tree, bits
from tests.tolerances import assert_close, float64

all_kinds = pytest.mark.parametrize("kind", MAKERS)
OURS = {"max_norm", "clip_value", "l1", "l2", "skipped_steps", "clipped_steps"}


def trained(kind: str, steps: int = 3, **ours: Any) -> tuple[list[Parameter], Any]:
    params = dense_parameters()
    optimizer = MAKERS[kind](params, max_norm=1.0, **ours)
    for seed in range(steps):
        give(params, seed)
        optimizer.step()
    return params, optimizer


@all_kinds
def test_point_9_policy_state_survives(backend: Backend, kind: str) -> None:
    params, optimizer = trained(kind)
    give(params, 0, math.nan)
    optimizer.step()
    optimizer.param_groups[0].update(max_norm=0.25, l1=1e-3, clip_value=0.5)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = MAKERS[kind](dense_parameters(), max_norm=1.0)
    with pytest.warns(UserWarning, match=r"max_norm: loaded 0\.25, asked for 1\.0"):
        fresh.load_state_dict(state)
    assert (fresh.skipped_steps, fresh.clipped_steps) == (1, 3)
    group = fresh.param_groups[0]
    assert (group["max_norm"], group["l1"], group["clip_value"]) == (0.25, 1e-3, 0.5)
    assert_same_tree(fresh.state_dict(), optimizer.state_dict())


@all_kinds
def test_point_9_no_global_key_in_the_state(backend: Backend, kind: str) -> None:
    params, optimizer = trained(kind)
    assert all(isinstance(key, torch.Tensor) for key in optimizer.state)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert set(optimizer.state_dict()["state"]) <= set(range(len(params)))


@all_kinds
def test_point_9_a_plain_torch_checkpoint_loads(backend: Backend, kind: str) -> None:
    theirs = dense_parameters()
    torchs = make_twin(kind, theirs)
    mine, ours = trained(kind, steps=2)
    for seed in range(3):
        give(theirs, seed)
        clip_grad_norm_(theirs, 1.0)
        torchs.step()
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert ours.param_groups[0]["max_norm"] == 1.0
    for one, other in zip(mine, theirs, strict=True):
        one.data.copy_(other.data)
    for seed in range(3, 6):
        give(mine, seed)
        give(theirs, seed)
        ours.step()
        clip_grad_norm_(theirs, 1.0)
        torchs.step()
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "subclass"])
def test_point_9_a_plain_checkpoint_loaded_into_the_wrapped_optimizer(
    backend: Backend, kind: str
) -> None:
    (mine, ours), (theirs, same) = (trained(kind, l2=1e-3) for _ in range(2))
    plain = make_twin(kind, dense_parameters()).state_dict()
    ours.optimizer.load_state_dict(copy.deepcopy(plain))
    same.load_state_dict(copy.deepcopy(plain))
    for params, optimizer in ((mine, ours), (theirs, same)):
        give(params, 4)
        optimizer.step()
        assert optimizer.clipped_steps >= 1
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(mine, theirs, strict=True))


@all_kinds
def test_point_9_a_torch_optimizer_loads_ours(backend: Backend, kind: str) -> None:
    mine, ours = trained(kind)
    theirs = [Parameter(p.detach().clone()) for p in mine]
    torchs = make_twin(kind, theirs, lr=9.0)
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torchs.param_groups[0]["lr"] == 0.05
    for seed in range(3, 6):
        give(mine, seed)
        give(theirs, seed)
        ours.step()
        clip_grad_norm_(theirs, 1.0)
        torchs.step()
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


@all_kinds
def test_point_9_our_keys_are_in_every_group(backend: Backend, kind: str) -> None:
    params = dense_parameters()
    optimizer = MAKERS[kind]([{"params": params[:1]}, {"params": params[1:], "l1": 0.5}], l2=0.1)
    for group, l1 in zip(optimizer.param_groups, (0.0, 0.5), strict=True):
        assert set(group) >= OURS
        assert (group["l1"], group["l2"], group["max_norm"]) == (l1, 0.1, None)


@all_kinds
def test_a_checkpoint_of_another_shape_is_refused_as_in_torch(backend: Backend, kind: str) -> None:
    _, optimizer = trained(kind)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(MAKERS[kind](dense_parameters()[:2]).state_dict())
    assert_same_tree(optimizer.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["AdamW", "subclass"])
def test_point_10_float32_state_stays_float32(
    backend: Backend, kind: str, dtype: torch.dtype
) -> None:
    params = [Parameter(torch.linspace(-1, 1, 40).to(dtype))]
    optimizer = MAKERS[kind](params, max_norm=1.0)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    # The parameter's dtype cannot hold these values.
    moments = {
        "exp_avg": torch.linspace(0.1, 0.2, 40) + 1e-6,
        "exp_avg_sq": torch.linspace(0.1, 0.3, 40) + 1e-6,
    }
    state["state"][0].update({key: value.clone() for key, value in moments.items()})
    optimizer.load_state_dict(state)
    for key, value in moments.items():
        assert optimizer.state[params[0]][key].dtype == torch.float32
        assert torch.equal(optimizer.state[params[0]][key], value)
    assert optimizer.state[params[0]]["step"].dtype == torch.float32
    # The step uses them as they are.
    gradient = torch.linspace(-2, 2, 40).to(dtype)
    params[0].grad = gradient.clone()
    coefficient = 1.0 / (float64(gradient.double().norm()) + 1e-6)
    want, new_state = adam(
        float64(params[0]),
        float64(gradient) * coefficient,
        {"step": 1.0, **{key: float64(value) for key, value in moments.items()}},
        lr=0.05,
        weight_decay=0.01,
        decoupled_weight_decay=True,
    )
    optimizer.step()
    for key in moments:
        got = optimizer.state[params[0]][key]
        assert got.dtype == torch.float32
        assert_close(got, new_state[key], torch.float32)
    rounded = torch.as_tensor(want).to(dtype)
    # The update itself is rounded once, so the last place may differ by one unit.
    assert torch.allclose(params[0].detach().double(), rounded.double(), rtol=2.0**-7, atol=1e-6)


@all_kinds
def test_point_10_half_checkpoints_round_trip_bit_for_bit(backend: Backend, kind: str) -> None:
    params = dense_parameters(torch.bfloat16)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    for seed in range(3):
        give(params, seed)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(before)
    assert_same_tree(optimizer.state_dict(), before)


class Net(nn.Module):
    """Two layers whose names the distributed checkpoint uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 2)


@pytest.fixture
def nets() -> Iterator[tuple[Net, Net]]:
    """Two equal models, without a process group."""
    assert not torch.distributed.is_initialized()
    yield Net(), Net()


def train(model: Net, optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        give(list(model.parameters()), seed)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("kind", WITH_STATE)
def test_point_9_distributed_checkpoints_round_trip(
    backend: Backend, kind: str, flatten: bool, nets: tuple[Net, Net]
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    one, other = nets
    ours = MAKERS[kind](one.parameters(), max_norm=0.7)
    train(one, ours, range(3))
    give(list(one.parameters()), 0, math.inf)
    ours.step()
    ours.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(one, ours, options=options))
    names = {key.split(".")[1] for key in saved} if flatten else {"first", "second"}
    assert names == {"first", "second"}
    fresh = MAKERS[kind](other.parameters(), max_norm=1.0)
    other.load_state_dict(one.state_dict())
    with pytest.warns(UserWarning, match=r"max_norm: loaded 0\.7, asked for 1\.0") as warned:
        set_optimizer_state_dict(other, fresh, saved, options=options)
    assert len(warned) == 1
    assert (fresh.skipped_steps, fresh.clipped_steps) == (1, 3)
    assert fresh.param_groups[0]["max_norm"] == 0.7
    train(one, ours, range(3, 6))
    train(other, fresh, range(3, 6))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))
    assert_same_tree(tensor_state(fresh), tensor_state(ours))


@pytest.mark.parametrize("kind", WITH_STATE)
def test_point_9_distributed_checkpoints_go_to_torch_and_back(
    backend: Backend, kind: str, nets: tuple[Net, Net]
) -> None:
    one, other = nets
    ours = MAKERS[kind](one.parameters(), max_norm=1.0)
    torchs = make_twin(kind, other.parameters())
    for seed in range(3):
        train(one, ours, range(seed, seed + 1))
        give(list(other.parameters()), seed)
        clip_grad_norm_(other.parameters(), 1.0)
        torchs.step()
        torchs.zero_grad()
    from_ours = copy.deepcopy(get_optimizer_state_dict(one, ours))
    from_torch = copy.deepcopy(get_optimizer_state_dict(other, torchs))
    ours = MAKERS[kind](one.parameters(), max_norm=1.0)
    torchs = make_twin(kind, other.parameters())
    set_optimizer_state_dict(one, ours, from_torch)
    set_optimizer_state_dict(other, torchs, from_ours)
    for seed in range(3, 6):
        train(one, ours, range(seed, seed + 1))
        give(list(other.parameters()), seed)
        clip_grad_norm_(other.parameters(), 1.0)
        torchs.step()
    assert_same_params(list(one.parameters()), list(other.parameters()), torch.float32)
    assert_same_state(ours, torchs, torch.float32)


@all_kinds
def test_point_11_making_fresh_state_is_no_step(
    backend: Backend, kind: str, nets: tuple[Net, Net]
) -> None:
    model, _ = nets
    optimizer = MAKERS[kind](model.parameters(), max_norm=0.0, l1=0.1, l1_mode="proximal")
    before = [bits(p) for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (0, 0)
    assert not optimizer.has_stepped or optimizer.grad_norm.item() == 0.0
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert all(p.grad is None for p in model.parameters())


def test_point_11_the_state_that_it_makes_is_torchs(
    backend: Backend, nets: tuple[Net, Net]
) -> None:
    one, other = nets
    ours = sg.Stabilizer(torch.optim.AdamW(one.parameters()), max_norm=1.0)
    torchs = torch.optim.AdamW(other.parameters())
    got, want = get_optimizer_state_dict(one, ours), get_optimizer_state_dict(other, torchs)
    assert_same_tree(got["state"], want["state"])
