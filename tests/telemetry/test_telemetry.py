"""What steps record in the ring, compared with NumPy, on every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steadygrad as sg
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.device_twins import asynchronous_device, no_waiting
from tests.policies.policy_runs import CLIPS, recorded_norms

SHAPES = ((3, 5), (7,), (2, 3, 4), (1,))
STEPS = 12


def parameters(backend: Backend, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(s, dtype=dtype, device=backend.device)) for s in SHAPES]


def gradients(step: int, params: list[nn.Parameter]) -> list[np.ndarray[Any, Any] | None]:
    """Set gradients and return them; the second parameter has none in odd steps."""
    rng = np.random.default_rng(step)
    found: list[np.ndarray[Any, Any] | None] = []
    for i, param in enumerate(params):
        grad = rng.normal(0, 1 + step % 3, tuple(param.shape)).astype(np.float32)
        found.append(None if i == 1 and step % 2 else grad)
        param.grad = None if found[-1] is None else torch.tensor(grad).to(param)
    return found


def norm(values: Any, p: float) -> float:
    return float(np.linalg.norm(np.asarray(values, np.float64), p))


def recorded(opt: Any) -> sg.History:
    """Return the history after waiting for the device."""
    history: sg.History = opt.report().history
    return history


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_norms_are_those_of_the_gradients(backend: Backend, scope: Any, p: float) -> None:
    params = parameters(backend)
    limits = [1.5, 4.0]
    groups = [
        {"params": params[:2], "max_norm": limits[0]},
        {"params": params[2:], "max_norm": limits[1]},
    ]
    opt = sg.optim.SGD(groups, lr=0.1, clip_scope=scope, norm_type=p, telemetry="tensor")
    group_of = [0, 0, 1, 1]
    for step in range(STEPS):
        grads = gradients(step, params)
        opt.step()
        norms = [math.nan if g is None else norm(g.ravel(), p) for g in grads]
        seen = [0.0 if math.isnan(n) else n for n in norms]
        total = norm(seen, p)
        groups_norms = [norm(seen[:2], p), norm(seen[2:], p)]
        scaled = []
        for place, own in enumerate(seen):
            of_scope = {"global": total, "group": groups_norms[group_of[place]], "tensor": own}
            coefficient = min(1.0, limits[group_of[place]] / (of_scope[scope] + 1e-6))
            scaled.append(coefficient * own)
        (record,) = recorded(opt).since(step)
        assert record.step == step
        assert math.isclose(record.norm, total, rel_tol=1e-6)
        assert math.isclose(record.clipped_norm, norm(scaled, p), rel_tol=1e-6)
        assert math.isnan(record.limit)  # the groups' limits differ
        assert record.clipped and not record.skipped and record.nonfinite == 0
        np.testing.assert_allclose(record.tensor_norms, norms, rtol=1e-6)
        assert record.tensor_nonfinite.tolist() == [0] * 4
    assert recorded(opt).step.tolist() == list(range(STEPS))


def test_the_total_alone(backend: Backend) -> None:
    params = parameters(backend)
    opt = sg.optim.SGD(params, lr=0.1, max_norm=3.0, telemetry="global")
    for step in range(STEPS):
        gradients(step, params)
        opt.step()
        (record,) = recorded(opt).since(step)
        assert math.isclose(record.norm, float(opt.grad_norm), rel_tol=1e-6)
        assert math.isclose(record.clipped_norm, min(record.norm, 3.0), rel_tol=1e-6)
        assert record.limit == 3.0
        assert record.tensor_norms is None and record.tensor_nonfinite is None
    unlimited = sg.optim.SGD(params, lr=0.1, telemetry="global")
    unlimited.step()
    assert recorded(unlimited).limit.tolist() == [math.inf]
    assert recorded(unlimited).clipped_norm.tolist() == recorded(unlimited).norm.tolist()


def test_the_oldest_steps_make_room(backend: Backend) -> None:
    params = parameters(backend)
    telemetry = sg.Telemetry(level="tensor", history=5)
    opt = sg.optim.SGD(params, lr=0.1, telemetry=telemetry)
    whole = sg.optim.SGD(parameters(backend), lr=0.1, telemetry="tensor")
    for step in range(STEPS):
        gradients(step, params)
        opt.step()
        gradients(step, [p for group in whole.param_groups for p in group["params"]])
        whole.step()
    assert recorded(opt).step.tolist() == list(range(STEPS - 5, STEPS))
    np.testing.assert_array_equal(recorded(opt).norm, recorded(whole).norm[-5:])
    np.testing.assert_array_equal(recorded(opt).tensor_norms, recorded(whole).tensor_norms[-5:])


@pytest.mark.parametrize("name", ["percentile-window", "zscore-capped", "relative", "damp"])
def test_a_policys_limit(backend: Backend, name: str) -> None:
    case = CLIPS[name]
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64, device=backend.device))
    opt = sg.optim.SGD([param], lr=1.0, clip=case.policy(), clip_scope="global", telemetry="global")
    expected = case.reference()
    seen = 0
    for step, value in enumerate(recorded_norms(150)):
        param.grad = torch.full_like(param, value)
        opt.step()
        (record,) = recorded(opt).since(step)
        if not math.isfinite(value):
            assert record.skipped and math.isnan(record.limit) and math.isnan(record.clipped_norm)
            continue
        coefficient = expected.coefficient(value)
        assert math.isclose(record.clipped_norm, coefficient * value, rel_tol=1e-9)
        assert record.clipped == (coefficient != 1)
        if record.clipped and name != "damp":
            seen += 1
            # The coefficient is limit / (norm + 1e-6).
            assert math.isclose(record.limit, coefficient * (value + 1e-6), rel_tol=1e-9)
        elif name != "damp" and value > 0:
            assert record.limit >= record.norm * (1 - 1e-9)
    assert name == "damp" or seen > 10


def test_steps_that_are_not_taken(backend: Backend) -> None:
    params = parameters(backend)
    skip = sg.SkipSpikes(sigma=4.0, window=8)
    opt = sg.optim.SGD(params, lr=0.1, max_norm=1.0, skip=skip, telemetry="tensor")
    for step in range(10):
        gradients(0, params)
        if step == 3:
            params[2].grad[0, 0, :2] = torch.tensor([math.nan, math.inf])
            params[0].grad[1, 1] = math.inf
        if step == 8:
            params[3].grad.fill_(1e4)
        opt.step()
    history = recorded(opt)
    assert np.flatnonzero(history.skipped).tolist() == [3, 8]
    assert np.flatnonzero(history.spiked).tolist() == [8]
    assert history.nonfinite.tolist() == [3 if step == 3 else 0 for step in range(10)]
    assert history.tensor_nonfinite[3].tolist() == [1, 0, 2, 0]
    assert math.isinf(history.tensor_norms[3, 0]) and math.isnan(history.tensor_norms[3, 2])
    assert np.isnan(history.clipped_norm[[3, 8]]).all()
    assert history.limit.tolist() == [1.0] * 10
    assert history.norm[8] >= 1e4


def test_what_the_policies_on_non_finite_elements_leave(backend: Backend) -> None:
    for nonfinite in ("zero", "raise", "propagate"):
        params = parameters(backend)
        opt = sg.optim.SGD(params, lr=0.1, max_norm=1.0, nonfinite=nonfinite, telemetry="tensor")
        grads = gradients(0, params)
        params[0].grad[0, 0] = math.nan
        if nonfinite == "raise":
            with pytest.raises(sg.NonfiniteGradientError):
                opt.step()
        else:
            opt.step()
        (record,) = recorded(opt)
        assert record.nonfinite == 1 and record.tensor_nonfinite.tolist() == [1, 0, 0, 0]
        assert record.refused == (nonfinite == "raise") and not record.skipped
        if nonfinite == "zero":
            grads[0][0, 0] = 0
            total = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads))
            assert math.isclose(record.norm, total, rel_tol=1e-6)
            assert math.isclose(record.clipped_norm, 1.0, rel_tol=1e-5)
        else:
            assert math.isnan(record.norm) and math.isnan(record.clipped_norm)


def test_the_in_place_path_records_too(backend: Backend) -> None:
    params = parameters(backend)
    opt = sg.Stabilizer(unfused.Adadelta(params), max_norm=1.0, telemetry="tensor")
    for step in range(4):
        gradients(step, params)
        if step == 2:
            params[3].grad.fill_(math.nan)
        opt.step()
    assert opt.path.startswith("in-place")
    history = recorded(opt)
    assert len(history) == 4 and history.skipped.tolist() == [False, False, True, False]
    np.testing.assert_allclose(history.clipped_norm[[0, 1, 3]], 1.0, rtol=1e-5)


def test_recording_changes_nothing_else(backend: Backend) -> None:
    results = []
    for level in (None, "global", "tensor"):
        params = parameters(backend)
        opt = sg.optim.AdamW(
            params, lr=0.1, clip=sg.ClipZScore(warmup=2), skip=sg.SkipSpikes(), telemetry=level
        )
        for step in range(STEPS):
            gradients(step, params)
            opt.step()
        results.append([p.detach().cpu() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_scaled_gradient_is_recorded_unscaled(backend: Backend) -> None:
    params = parameters(backend)
    opt = sg.optim.SGD(params, lr=0.1, telemetry="tensor")
    grads = gradients(0, params)
    for param in params:
        param.grad *= 1024
    opt.grad_scale = torch.tensor(1024.0, device=backend.device)
    opt.found_inf = torch.tensor(0.0, device=backend.device)
    opt.step()
    (record,) = recorded(opt)
    np.testing.assert_allclose(
        record.tensor_norms, [norm(g.ravel(), 2.0) for g in grads], rtol=1e-6
    )


def test_a_step_waits_for_nothing(backend: Backend) -> None:
    device = asynchronous_device(backend)
    params = parameters(backend)
    seen: list[int] = []
    # A look is a copy and an event. The emulated device has neither, so its look comes after the guard.
    every = 2 if device.type == "cuda" else 8
    telemetry = sg.Telemetry(
        level="tensor", history=8, every=every, writers=[lambda record: seen.append(record.step)]
    )
    opt = sg.optim.SGD(params, lr=0.1, max_norm=1.0, telemetry=telemetry)
    gradients(0, params)
    opt.step()
    for step in range(1, 6):
        gradients(step, params)
        with no_waiting(device):
            opt.step()
    assert opt.report().steps == 6
    assert seen == list(range(6))
