"""Steps that the device decides: what they decide and count there, without anything waiting."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import steadygrad as sg
from steadygrad import _kernels
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.device_twins import (
    NAN,
    Options,
    Twins,
    all_rules,
    asynchronous_device,
    both_ways,
    no_waiting,
)
from tests.optim.optimizer_kinds import give
from tests.optim.optimizer_runs import assert_same_params, assert_same_state
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import Snapshot
from tests.tolerances import assert_close


@pytest.fixture
def device(backend: Backend) -> torch.device:
    return asynchronous_device(backend)


def test_functions_leave_their_results_on_the_device(device: torch.device) -> None:
    params = dense_parameters(device=device)
    give(params)
    grads = [p.grad for p in params if p.grad is not None]
    with no_waiting(device):
        results = [sg.get_total_norm(grads), sg.get_total_norm(grads, 3.0)]
        results.append(sg.clip_grad_norm_(params, 1.0))
        results.append(sg.add_penalty_(params, l1=0.1, l2=0.1))
        sg.clip_grads_with_norm_(params, 1.0, results[0])
        sg.clip_grad_value_(params, 0.1)
        sg.soft_threshold_(params, 0.01)
    assert all(r.device == device and r.dim() == 0 and r.item() > 0 for r in results)


@pytest.mark.parametrize("wait", ["get_total_norm", "clip_grad_norm_"])
def test_error_if_nonfinite_is_what_waits(device: torch.device, wait: str) -> None:
    params = dense_parameters(device=device)
    give(params, 0, NAN)
    snapshot = Snapshot(params)
    with pytest.raises(RuntimeError, match=r"1 non-finite"):
        if wait == "get_total_norm":
            sg.get_total_norm([p.grad for p in params], error_if_nonfinite=True)  # type: ignore[misc]
        else:
            sg.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    snapshot.assert_unchanged()


@both_ways
@all_rules
def test_no_step_waits(device: torch.device, rule: str, wrap: bool) -> None:
    twins = Twins(rule, device, wrap)
    norms = []
    for step in range(20):
        active = step % 3 != 1
        twins.max_norm = twins.ours.param_groups[0]["max_norm"] = 1.0 if active else 1e4
        twins.ours.zero_grad(set_to_none=True)
        bad, without = NAN if step in (0, 7) else None, [2] if step in (5, 6) else []
        twins.step(step, bad, without, guarded=True)
        norms.append(twins.ours.grad_norm)
    assert [math.isnan(norm.item()) for norm in norms] == [step in (0, 7) for step in range(20)]
    assert all(norm.device == device for norm in norms)
    clipped = [step for step in range(20) if step % 3 != 1 and step not in (0, 7)]
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (2, len(clipped))
    twins.assert_equal()


@pytest.mark.parametrize(
    "ours",
    [
        {"write_grads": True, "l1": 0.01},
        {"l1": 0.01, "l1_mode": "proximal"},
        {"nonfinite": "zero", "clip_scope": "tensor"},
        {"nonfinite": "propagate", "clip_scope": "group", "norm_type": 3.0},
    ],
    ids=lambda ours: "-".join(map(str, ours)),
)
def test_no_option_waits(device: torch.device, ours: Options) -> None:
    params = dense_parameters(device=device)
    rate = torch.tensor(0.01, device=device)
    inner = torch.optim.AdamW(params, lr=rate, foreach=False, capturable=True)
    optimizer = sg.Stabilizer(inner, max_norm=1.0, **ours)
    assert optimizer.path == "fused"
    scale, found_inf = torch.tensor(4.0, device=device), torch.zeros(1, device=device)
    for seed in range(5):
        give(params, seed, NAN if seed == 2 else None)
        rate.mul_(0.5)
        with no_waiting(device):
            optimizer.grad_scale, optimizer.found_inf = scale, found_inf
            optimizer.step()
    skipped = 0 if "nonfinite" in ours else 1
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (skipped, 5 - skipped)


def test_a_rate_of_zero_does_not_wait(device: torch.device) -> None:
    # Schedules with a warm-up begin at a learning rate of 0.
    twins = Twins("AdamW", device)
    for step, rate in enumerate((0.0, 0.01, 0.0)):
        for optimizer in (twins.ours, twins.torchs):
            optimizer.param_groups[0]["lr"] = rate
        twins.step(step, guarded=True)
    twins.assert_equal()


def test_a_first_gradient_that_comes_late_does_not_wait(device: torch.device) -> None:
    twins = Twins("AdamW", device)
    for step in range(4):
        twins.step(step, without=range(4 - step), guarded=True)
    twins.assert_equal()


def test_hundreds_of_steps_are_counted_without_reading(device: torch.device) -> None:
    param = Parameter(torch.ones(3, device=device))
    optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=1e-3), max_norm=1.0)
    for step in range(300):
        value = NAN if step % 7 == 0 else 2.0 if step % 2 else 0.1
        param.grad = torch.full_like(param, value)
        optimizer.step()
    clipped = sum(step % 2 == 1 and step % 7 != 0 for step in range(300))
    for _ in range(2):
        assert (optimizer.skipped_steps, optimizer.clipped_steps) == (43, clipped)
    assert optimizer.param_groups[0]["skipped_steps"] == 43


@pytest.mark.parametrize("rule", ["SGD-dampened", "AdamW"])
def test_scale_and_found_inf_of_several_devices(device: torch.device, rule: str) -> None:
    twins = Twins(rule, device)
    for seed, found in enumerate([2.0, 0.0, 3.0, 0.0]):
        for params in (twins.mine, twins.theirs):
            give(params, seed)
        for param in twins.mine:
            assert param.grad is not None
            param.grad.mul_(512.0)
        twins.ours.grad_scale = torch.tensor([512.0], device=device)
        twins.ours.found_inf = torch.tensor([found], device=device)
        twins.ours.step()
        if not found:
            clip_grad_norm_(twins.theirs, 1.0)
            twins.torchs.step()
    del twins.ours.grad_scale, twins.ours.found_inf
    assert twins.ours.skipped_steps == 2
    twins.assert_equal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Adagrad", "RMSprop-both"])
def test_a_rate_on_the_device_is_followed(
    device: torch.device, rule: str, dtype: torch.dtype
) -> None:
    twins = Twins(rule, device)
    rate = twins.ours.param_groups[0]["lr"] = torch.tensor(0.5, dtype=dtype, device=device)
    counts = []
    for step in range(4):
        rate.fill_(0.5**step)
        twins.torchs.param_groups[0]["lr"] = 0.5**step
        before = _kernels.launch_count()
        twins.step(0)
        counts.append(_kernels.launch_count() - before)
    assert counts[1:] == [3, 3, 3] and counts[0] > 3
    assert twins.ours.param_groups[0]["lr"] is rate
    twins.assert_equal()


@pytest.mark.parametrize("named", [False, True])
def test_raise_names_the_parameter_and_keeps_everything(device: torch.device, named: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2)).to(device)
    params = list(model.parameters())
    inner = torch.optim.AdamW(model.named_parameters() if named else params, lr=0.1)
    optimizer = sg.Stabilizer(inner, max_norm=1.0, nonfinite="raise")
    for step in range(3):
        give(params, step)
        grad = params[2].grad
        assert grad is not None
        grad[1, 2:4] = math.inf
        params[0].grad = None
        snapshot = Snapshot(params, optimizer)
        name = "1.weight" if named else r"param_groups\[0\]\['params'\]\[2\]"
        with pytest.raises(sg.NonfiniteGradientError, match=rf"2 non-finite ones in {name} \(2\)"):
            optimizer.step()
        snapshot.assert_unchanged()
        give(params, step)
        optimizer.step()
        assert optimizer.clipped_steps == step + 1 and optimizer.skipped_steps == 0


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
def test_the_step_of_an_optimizer_without_a_rule(device: torch.device, nonfinite: str) -> None:
    mine, theirs = (dense_parameters(device=device) for _ in range(2))
    ours = sg.Stabilizer(unfused.NAdam(mine, lr=0.05), max_norm=1.0, nonfinite=nonfinite)
    torchs = unfused.NAdam(theirs, lr=0.05)
    for seed in range(5):
        bad = seed in (0, 3) and nonfinite != "propagate"
        give(mine, seed, NAN if bad else None)
        ours.step()
        give(theirs, seed, 0.0 if bad else None)
        if not (bad and nonfinite == "skip"):
            clip_grad_norm_(theirs, 1.0)
            torchs.step()
    skipped = 2 if nonfinite == "skip" else 0
    assert (ours.skipped_steps, ours.clipped_steps) == (skipped, 5 - skipped)
    assert ours.path.startswith("in-place")
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


def test_optimizers_that_take_turns(device: torch.device) -> None:
    turns = [Twins(rule, device) for rule in ("AdamW", "SGD-dampened", "AdamW")]
    for seed in range(6):
        for place, twins in enumerate(turns):
            twins.step(seed + place, NAN if (seed + place) % 4 == 0 else None)
    for place, twins in enumerate(turns):
        skipped = sum((seed + place) % 4 == 0 for seed in range(6))
        assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (skipped, 6 - skipped)
        twins.assert_equal()


@pytest.mark.parametrize("order", ["before_clip", "after_clip"])
def test_written_gradients_are_those_of_the_update(device: torch.device, order: str) -> None:
    params = dense_parameters(device=device)
    ours = {"max_norm": 0.5, "write_grads": True, "l2": 0.1, "penalty_order": order}
    optimizer = sg.optim.SGD(params, lr=0.5, **ours)
    for seed, bad in ((0, None), (1, NAN), (2, None)):
        give(params, seed, bad)
        before = [p.detach().clone() for p in params]
        snapshot = Snapshot(params)
        optimizer.step()
        if bad is not None:
            snapshot.assert_unchanged()
            continue
        for param, old in zip(params, before, strict=True):
            assert param.grad is not None
            assert_close(param, old - 0.5 * param.grad, torch.float32)


def test_a_proximal_step_takes_the_rate_of_the_device(device: torch.device) -> None:
    params = dense_parameters(device=device)
    optimizer = sg.optim.SGD(params, lr=0.5, l1=1.0, l1_mode="proximal")
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device=device)
    for seed, bad in ((0, None), (1, NAN), (2, None)):
        rate.mul_(0.5)
        give(params, seed, bad)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert param.grad is not None
            moved = (
                old if bad else torch.nn.functional.softshrink(old - rate * param.grad, rate.item())
            )
            assert_close(param, moved, torch.float32)
    assert optimizer.skipped_steps == 1
