"""State where the device decides about steps: it is kept only if the step was taken, and saved with its counts."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import steadygrad as sg
from tests.backends import Backend
from tests.optim.device_twins import DAMPENED, NAN, Twins, all_rules, asynchronous_device, both_ways
from tests.optim.optimizer_kinds import give
from tests.optim.optimizer_runs import make_ours
from tests.optim.parameter_sets import dense_parameters


@pytest.fixture
def device(backend: Backend) -> torch.device:
    return asynchronous_device(backend)


@both_ways
@all_rules
@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_a_skipped_first_step_leaves_nothing_behind(
    device: torch.device, read: bool, rule: str, wrap: bool
) -> None:
    twins = Twins(rule, device, wrap)
    for seed in range(2):
        twins.step(seed, NAN)
        if read:
            twins.assert_equal()
            assert rule == "Adagrad" or not twins.ours.state_dict()["state"]
    for seed in range(2, 5):
        twins.step(seed)
    twins.step(5, math.inf)
    twins.step(6)
    twins.assert_equal()
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (3, 4)


@pytest.mark.parametrize("rule", ["SGD-dampened", "AdamW", "RMSprop-both"])
@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_a_skipped_first_step_of_one_parameter(device: torch.device, read: bool, rule: str) -> None:
    twins = Twins(rule, device)
    # Parameter 1 has its first gradient in a step that is skipped, then none, then one in a step that is taken.
    for seed, bad, without in [
        (0, None, [1]),
        (1, NAN, []),
        (2, None, [1]),
        (3, NAN, [0]),
        (4, None, []),
        (5, None, []),
    ]:
        twins.step(seed, bad, without)
        if read:
            twins.assert_equal()
            assert (1 in twins.ours.state_dict()["state"]) == (seed > 3)
    twins.assert_equal()


@pytest.mark.parametrize("where", ["wrapper", "wrapped"])
@pytest.mark.parametrize("rule", ["SGD-dampened", "AdamW", "RMSprop-both"])
def test_a_checkpoint_loaded_after_a_skipped_first_step(
    device: torch.device, rule: str, where: str
) -> None:
    twins = Twins(rule, device)
    trained = Twins(rule, device)
    for seed in range(3):
        trained.step(seed)
    twins.step(0, NAN)
    into = twins.ours if where == "wrapper" else twins.ours.optimizer
    into.load_state_dict(copy.deepcopy(trained.torchs.state_dict()))
    twins.torchs.load_state_dict(copy.deepcopy(trained.torchs.state_dict()))
    twins.assert_equal()
    for seed in range(3, 6):
        twins.step(seed)
    twins.assert_equal()


def test_state_set_after_a_skipped_first_step_is_kept(device: torch.device) -> None:
    twins = Twins("SGD-dampened", device)
    twins.step(0, NAN)
    for params, optimizer in ((twins.mine, twins.ours), (twins.theirs, twins.torchs)):
        for param in params:
            optimizer.state[param] = {"momentum_buffer": torch.full_like(param, 0.25)}
    for seed in range(1, 3):
        twins.step(seed)
    twins.assert_equal()


def test_a_new_wrapper_after_a_skipped_first_step(device: torch.device) -> None:
    twins = Twins("SGD-dampened", device)
    twins.step(0, NAN)
    twins.ours = sg.Stabilizer(twins.ours.optimizer, max_norm=1.0)
    for seed in range(1, 3):
        twins.step(seed)
    twins.assert_equal()
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (1, 2)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@both_ways
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("good", [0, 2])
def test_copies_take_what_was_counted(
    device: torch.device, good: int, how: str, wrap: bool
) -> None:
    twins = Twins("SGD-dampened", device, wrap)
    for seed in range(good):
        twins.step(seed)
    twins.step(8, NAN)
    twins.ours = COPIES[how](twins.ours)
    twins.mine = twins.ours.param_groups[0]["params"]
    for seed in range(2, 4):
        twins.step(seed)
    twins.assert_equal()
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (1, good + 2)


@both_ways
@pytest.mark.parametrize("good", [0, 2])
def test_checkpoints_take_what_was_counted(device: torch.device, good: int, wrap: bool) -> None:
    twins = Twins("SGD-dampened", device, wrap)
    for seed in range(good):
        twins.step(seed)
    twins.step(8, NAN)
    buffer = io.BytesIO()
    torch.save(twins.ours.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert saved["param_groups"][0]["skipped_steps"] == 1
    assert bool(saved["state"]) == bool(good)
    twins.ours = make_ours("SGD", twins.mine, DAMPENED, wrap, max_norm=9.0)
    give(twins.mine, 0, NAN)
    twins.ours.step()  # its own count is replaced by the loaded one
    with pytest.warns(UserWarning, match="max_norm: loaded 1.0, asked for 9.0"):
        twins.ours.load_state_dict(saved)
    assert twins.ours.param_groups[0]["max_norm"] == 1.0
    for seed in range(2, 4):
        twins.step(seed)
    twins.assert_equal()
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (1, good + 2)


@both_ways
def test_a_param_group_added_between_steps(device: torch.device, wrap: bool) -> None:
    twins = Twins("SGD-dampened", device, wrap)
    twins.step(0, NAN)
    twins.step(1)
    for params, optimizer in ((twins.mine, twins.ours), (twins.theirs, twins.torchs)):
        extra = dense_parameters(device=device, seed=7)[2:0:-1]
        optimizer.add_param_group({"params": extra, "lr": 0.2})
        params.extend(extra)
    twins.step(2, NAN)
    twins.step(3)
    twins.step(4, without=[0, 6])
    twins.assert_equal()
    groups = twins.ours.param_groups
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (2, 3)
    assert [group["skipped_steps"] for group in groups] == [2, 2]


@pytest.mark.parametrize("rule", ["Adam-amsgrad", "AdamW", "Adagrad", "RMSprop-both"])
def test_step_counters_live_on_the_device_and_go_both_ways(device: torch.device, rule: str) -> None:
    twins = Twins(rule, device)
    steps = [None, NAN, None]
    for seed, bad in enumerate(steps):
        twins.step(seed, bad)
    # torch keeps its counters on the CPU. Ours continues from them, and torch from ours.
    ours, torchs = (copy.deepcopy(o.state_dict()) for o in (twins.ours, twins.torchs))
    twins.ours.load_state_dict(torchs)
    twins.torchs.load_state_dict(ours)
    for seed, bad in enumerate(steps, 3):
        twins.step(seed, bad)
    twins.assert_equal()
    for param in twins.mine:
        counter = twins.ours.state[param]["step"]
        assert counter.device == device and counter.dtype == torch.float32 and counter.item() == 4


@pytest.mark.parametrize("rule", ["SGD-dampened", "AdamW"])
def test_parameters_that_come_and_go(device: torch.device, rule: str) -> None:
    twins = Twins(rule, device)
    absent = [[], [1], [], [0, 2, 3, 4], [1], [], [0, 1, 2, 3, 4], [3], []]
    for seed, without in enumerate(absent):
        twins.step(seed, NAN if seed in (0, 4) else None, without)
    twins.assert_equal()
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (2, 6)


@pytest.mark.parametrize("rule", ["SGD-dampened", "AdamW"])
def test_memory_that_moves_between_steps(device: torch.device, rule: str) -> None:
    twins = Twins(rule, device)
    kept = []  # keeps the memory of what was moved from being used again
    for seed in range(6):
        twins.step(seed, NAN if seed in (0, 3) else None)
        for index, param in enumerate(twins.mine):
            if seed % 2 == 0:
                kept.append(param.data)
                param.data = param.data.clone()
            for value in twins.ours.state.get(param, {}).values():
                if seed == 2 + index % 2:
                    kept.append(value.data)
                    value.data = value.data.clone()
    twins.assert_equal()
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (2, 4)


def test_a_parameter_that_is_replaced(device: torch.device) -> None:
    twins = Twins("SGD-dampened", device)
    twins.step(0)
    twins.step(1, NAN)
    for params, optimizer in ((twins.mine, twins.ours), (twins.theirs, twins.torchs)):
        params[2] = torch.nn.Parameter(torch.full((5, 7), 0.5, device=device))
        optimizer.param_groups[0]["params"][2] = params[2]
    twins.step(2, NAN)
    twins.step(3)
    assert twins.ours.skipped_steps == 2
    for params, optimizer in ((twins.mine, twins.ours), (twins.theirs, twins.torchs)):
        assert optimizer.state[params[2]]["momentum_buffer"].shape == (5, 7)
    twins.step(4)
    for one, other in zip(twins.mine, twins.theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_momentum_that_is_switched_on(device: torch.device) -> None:
    twins = Twins("SGD", device)
    twins.step(0)
    for optimizer in (twins.ours, twins.torchs):
        optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
    twins.step(1, NAN)
    for seed in range(2, 5):
        twins.step(seed)
    twins.assert_equal()


EVENTS = ["none", "none", "read", "save", "copy", "move", "rewrap", "swap", "reset"]
drawn_steps = st.lists(
    st.tuples(st.sampled_from(EVENTS), st.booleans(), st.sets(st.integers(0, 3))),
    min_size=1,
    max_size=7,
)


def happen(event: str, twins: Twins) -> None:
    """Do to ours what may be done between steps; torch's optimizer, which skipped nothing, is the reference."""
    ours, torchs = twins.ours, twins.torchs
    if event == "read":
        twins.assert_equal()
    elif event == "save":
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    elif event == "copy":
        twins.ours = copy.deepcopy(ours)
        twins.mine = twins.ours.param_groups[0]["params"]
    elif event == "move":
        for param in twins.mine:
            param.data = param.data.clone()
    elif event == "rewrap" and isinstance(ours, sg.Stabilizer):
        twins.ours = sg.Stabilizer(ours.optimizer, max_norm=1.0)
    elif event == "swap":
        ours.load_state_dict(copy.deepcopy(torchs.state_dict()) | _counts(ours))
    elif event == "reset":
        ours.state.clear()
        torchs.state.clear()


def _counts(ours: Any) -> dict[str, Any]:
    """Return the param groups' keys, so that a checkpoint of torch's does not reset the counts."""
    return {"param_groups": copy.deepcopy(ours.state_dict()["param_groups"])}


@both_ways
@pytest.mark.parametrize("rule", ["SGD-dampened", "RMSprop-both"])
@given(steps=drawn_steps)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_between_steps(
    device: torch.device, rule: str, wrap: bool, steps: list[tuple[str, bool, set[int]]]
) -> None:
    twins = Twins(rule, device, wrap)
    skipped = clipped = 0
    for seed, (event, bad, without) in enumerate(steps):
        happen(event, twins)
        twins.step(seed, NAN if bad else None, sorted(without))
        skipped += bad
        clipped += not bad
    twins.assert_equal()
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (skipped, clipped)
