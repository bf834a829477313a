"""Mixed precision: grad_scale, found_inf and torch's GradScaler (points 6 and 7)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import steadygrad as sg
from steadygrad.reference.norm import total_norm
from tests.backends import Backend
from tests.optim.optimizer_kinds import MAKERS, give, make_twin
from tests.optim.optimizer_runs import assert_same_params, assert_same_state
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import Snapshot, bits
from tests.tolerances import assert_close, float64

all_kinds = pytest.mark.parametrize("kind", MAKERS)


def scaled(params: list[Parameter], seed: int, scale: float, element: float | None = None) -> None:
    """Set the gradients that a scaled loss would give."""
    give(params, seed, element)
    for param in params:
        assert param.grad is not None
        param.grad.mul_(scale)


@pytest.mark.parametrize("scale", [65536.0, 1000.0, 0.25])
@all_kinds
def test_point_6_grad_scale_is_divided_out(backend: Backend, kind: str, scale: float) -> None:
    mine, theirs = (dense_parameters(device=backend.device) for _ in range(2))
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    for seed in range(5):
        scaled(mine, seed, scale)
        give(theirs, seed)
        before = [bits(p.grad) for p in mine if p.grad is not None]
        ours.grad_scale = torch.tensor(scale, device=backend.device)
        ours.found_inf = torch.zeros((), device=backend.device)
        ours.step()
        del ours.grad_scale, ours.found_inf
        norm = clip_grad_norm_(theirs, 1.0)
        torchs.step()
        assert_close(ours.grad_norm, norm, torch.float32)
        if ours.path == "fused":
            after = [bits(p.grad) for p in mine if p.grad is not None]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


# The in-place path writes the unscaled gradients in their own dtype before the optimizer reads them.
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "in-place"])
def test_point_6_the_norm_is_taken_after_unscaling_in_float32(backend: Backend, kind: str) -> None:
    # These vanish in float16 when they are unscaled, so only float32 arithmetic sees them.
    param = Parameter(torch.ones(1000, dtype=torch.float16, device=backend.device))
    optimizer = MAKERS[kind]([param], max_norm=1.0, nonfinite="raise")
    assert optimizer.path == "fused"
    values = torch.randn(1000, device=backend.device).half() * 1e-4
    param.grad = values
    optimizer.grad_scale = torch.tensor(65536.0, device=backend.device)
    optimizer.step()
    want = total_norm([float64(values) / 65536.0])
    assert optimizer.grad_norm.item() == pytest.approx(want, rel=2.0**-23, abs=0.0)


@all_kinds
def test_point_6_write_grads_writes_unscaled_gradients(backend: Backend, kind: str) -> None:
    mine, theirs = (dense_parameters(device=backend.device) for _ in range(2))
    optimizer = MAKERS[kind](mine, max_norm=1.0, write_grads=True)
    scaled(mine, 0, 1024.0)
    give(theirs)
    optimizer.grad_scale = torch.tensor(1024.0, device=backend.device)
    optimizer.step()
    clip_grad_norm_(theirs, 1.0)
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one.grad, other.grad, torch.float32)


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 7.0])
@all_kinds
def test_point_6_found_inf_is_a_sum(backend: Backend, kind: str, found_inf: float) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    give(params)
    snapshot = Snapshot(params, optimizer, counters=False)
    optimizer.grad_scale = torch.tensor(2.0, device=backend.device)
    optimizer.found_inf = torch.tensor(found_inf, device=backend.device)
    optimizer.step()
    snapshot.assert_unchanged()
    assert optimizer.skipped_steps == 1 and optimizer.clipped_steps == 0


@pytest.mark.parametrize("value", [None, 1.0])
@all_kinds
def test_point_6_a_scale_of_none_or_a_number(
    backend: Backend, kind: str, value: float | None
) -> None:
    mine, theirs = (dense_parameters(device=backend.device) for _ in range(2))
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    give(mine)
    give(theirs)
    ours.grad_scale, ours.found_inf = value, None
    ours.step()
    clip_grad_norm_(theirs, 1.0)
    torchs.step()
    assert_same_params(mine, theirs, torch.float32)


@all_kinds
def test_point_6_it_says_that_it_handles_scaling(backend: Backend, kind: str) -> None:
    optimizer = MAKERS[kind](dense_parameters(device=backend.device), max_norm=1.0)
    assert optimizer._step_supports_amp_scaling is True


@pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "step-only"])
@all_kinds
def test_points_6_and_7_grad_scaler(backend: Backend, kind: str, unscale: bool) -> None:
    def run(make: Any, stabilized: bool) -> tuple[list[Parameter], Any, list[float]]:
        params = dense_parameters(device=backend.device)
        optimizer = make(params)
        scaler = torch.amp.GradScaler(
            backend.device.type, init_scale=1024.0, growth_interval=3, backoff_factor=0.25
        )
        scales = []
        for step in range(10):
            optimizer.zero_grad()
            loss = torch.zeros((), device=backend.device)
            for index, param in enumerate(params):
                loss = loss + (param * (index + 1)).sin().sum() * 10.0 ** (step % 4 - 1)
            if step in (2, 7):
                loss = loss + (params[2] * math.inf).sum()
            scaler.scale(loss).backward()
            if unscale or not stabilized:
                scaler.unscale_(optimizer)
            if not stabilized:
                clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            assert not hasattr(optimizer, "found_inf") or not stabilized
        return params, optimizer, scales

    mine, ours, scales = run(lambda params: MAKERS[kind](params, max_norm=1.0), True)
    theirs, torchs, torch_scales = run(lambda params: make_twin(kind, params), False)
    assert scales == torch_scales
    assert ours.skipped_steps == 2
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


@all_kinds
def test_a_disabled_scaler(backend: Backend, kind: str) -> None:
    mine, theirs = (dense_parameters(device=backend.device) for _ in range(2))
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    scaler = torch.amp.GradScaler(backend.device.type, enabled=False)
    give(mine)
    give(theirs)
    scaler.unscale_(ours)
    scaler.step(ours)
    scaler.update()
    clip_grad_norm_(theirs, 1.0)
    torchs.step()
    assert_same_params(mine, theirs, torch.float32)


@all_kinds
def test_one_scaler_for_two_optimizers(backend: Backend, kind: str) -> None:
    params = [dense_parameters(device=backend.device, seed=seed) for seed in range(2)]
    optimizers = [MAKERS[kind](some, max_norm=1.0) for some in params]
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=8.0)
    total: Tensor = sum(((p - 1.0) ** 2).sum() for some in params for p in some)
    scaler.scale(total).backward()
    last = params[1][-1].grad
    assert last is not None
    last.view(-1)[0] = math.nan
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert [optimizer.skipped_steps for optimizer in optimizers] == [0, 1]
    assert scaler.get_scale() == 4.0


@all_kinds
def test_an_overflow_in_autocast_training(backend: Backend, kind: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model.to(backend.device)
    optimizer = MAKERS[kind](model.parameters(), max_norm=1.0)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=2.0**30)
    inputs = torch.randn(16, 6, device=backend.device)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        with torch.autocast(backend.device.type, dtype=torch.bfloat16):
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        factor = 1e36 if step == 4 else 1.0  # overflows the scaled loss once
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert optimizer.skipped_steps == 1 and scaler.get_scale() == 2.0**29
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad"])
def test_the_wrapped_optimizer_does_not_see_the_scale_twice(backend: Backend, kind: str) -> None:
    # torch's own fused flag makes the wrapped optimizer support scaling itself.
    mine, theirs = (dense_parameters(device=backend.device) for _ in range(2))
    inner = getattr(torch.optim, kind)(mine, lr=0.05, fused=True)
    ours, torchs = sg.Stabilizer(inner, max_norm=1.0), make_twin(kind, theirs)
    for seed in range(3):
        scaled(mine, seed, 4096.0)
        give(theirs, seed)
        ours.grad_scale = torch.tensor(4096.0, device=backend.device)
        ours.found_inf = torch.zeros((), device=backend.device)
        ours.step()
        del ours.grad_scale, ours.found_inf
        clip_grad_norm_(theirs, 1.0)
        torchs.step()
    assert_same_params(mine, theirs, torch.float32)
