"""Checks the bindings alone: wrong arguments give short errors, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import NormOutput, allocator
from steadygrad.optim.options import StabilizerOptions
from tests.backends import Backend

OPTIONS: dict[str, Any] = {
    "norm_type": 2.0,
    "clip_scope": "global",
    "nonfinite": "skip",
    "penalty_order": "before_clip",
    "l1_mode": "subgradient",
    "write_grads": False,
    "rounding": "nearest",
    "rounding_seed": 0,
    "per_tensor": False,
}


def test_lists_of_unequal_length(backend: Backend) -> None:
    params = [torch.ones(3, device=backend.device) for _ in range(3)]
    value = torch.empty((), dtype=torch.float64, device=backend.device)
    for grads in ([], params[:2], params * 2):
        with pytest.raises(ValueError, match=r"add_penalty_: grads: .*3, got"):
            _kernels.add_penalty_(params, grads, 0.5, 0.5, value, allocator(backend.device))


@pytest.mark.parametrize(
    "policy",
    [
        lambda: _kernels.ClipPolicy("percentile", level=0.5, window=0),
        lambda: _kernels.ClipPolicy("percentile", level=0.5, window=-3),
        lambda: _kernels.ClipPolicy("percentile", level=0.5, window=2**62),
        lambda: _kernels.ClipPolicy("percentiles", level=0.5, window=3),
        lambda: _kernels.SpikePolicy(sigma=6.0, window=-128),
        lambda: _kernels.SpikePolicy(sigma=6.0, window=1),
    ],
)
def test_names_and_windows_of_policies(policy: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="Plan: "):
        policy()


@pytest.mark.parametrize("count", [-5.0, 1e300, float("nan")])
def test_rows_that_hold_nonsense_stay_in_their_memory(count: float) -> None:
    window, guard = 4, 1000
    param = torch.ones(2)
    param.grad = torch.ones(2)
    policies = {
        "clip_policy": _kernels.ClipPolicy("percentile", max_norm=1.0, level=0.5, window=window),
        "skip_policy": _kernels.SpikePolicy(sigma=6.0, window=window),
    }
    groups: list[dict[str, Any]] = [{"params": [param]}]
    limits = StabilizerOptions().limits()
    plan = _kernels.Plan("none", False, groups, [None], {**OPTIONS, **policies}, limits, None)
    memory = torch.full((2 * guard + 4 + 2 * window,), 7.0, dtype=torch.float64)
    rows = memory[guard:-guard]
    rows.zero_()
    rows[2:4] = count
    spikes = torch.full((4 + window,), count, dtype=torch.float64)
    recorded = torch.tensor([-7])
    ring = torch.zeros(3 * 5, dtype=torch.float64)
    for _ in range(6):
        telemetry = _kernels.Telemetry(rows=ring, recorded=recorded, history=3, per_tensor=False)
        plan.step(groups, {}, clip_rows=rows, skip_row=spikes, telemetry=telemetry)
    assert torch.all(memory[:guard] == 7) and torch.all(memory[-guard:] == 7)
    assert int(recorded) == -1


def test_errors_about_arguments_are_short(backend: Backend) -> None:
    grads = [torch.ones(10_000, device=backend.device)]
    calls = [
        lambda: _kernels.clip_grad_norm_(grads, 1.0, 2.0, "yes", None, allocator(None)),  # type: ignore[arg-type]
        lambda: _kernels.grad_norm(grads, "two", None, allocator(None)),  # type: ignore[arg-type]
        lambda: _kernels.soft_threshold_(grads),  # type: ignore[call-arg]
        lambda: _kernels.batch_norm_layout(grads[0], grads[0]),  # type: ignore[call-arg]
    ]
    for call in calls:
        with pytest.raises(TypeError) as raised:
            call()
        assert len(str(raised.value)) < 200 and "tensor(" not in str(raised.value)


def test_memory_of_a_wrong_size_is_refused(backend: Backend) -> None:
    if not backend.asynchronous:
        pytest.skip("the CPU's kernels return what they find")
    grads = [torch.ones(100, device=backend.device)]
    small = torch.empty(1, dtype=torch.float64, device=backend.device)
    right = NormOutput(backend.device).tensors
    assert right is not None
    with pytest.raises(TypeError, match=r"output.*3 elements"):
        _kernels.grad_norm(grads, 2.0, (small, *right[1:]), allocator(backend.device))

    def one_byte(nbytes: int) -> Tensor:
        return torch.empty(1, dtype=torch.uint8, device=backend.device)

    with pytest.raises(TypeError, match="allocate"):
        _kernels.grad_norm(grads, 2.0, right, one_byte)


def test_an_allocation_that_replaces_memory_is_refused(backend: Backend) -> None:
    if not backend.asynchronous:
        pytest.skip("the CPU's kernels allocate nothing in Python")
    grads = [torch.ones(100, device=backend.device)]

    def replaces(nbytes: int) -> Tensor:
        grads[0].data = torch.zeros(100, device=backend.device)
        return torch.empty(nbytes, dtype=torch.uint8, device=backend.device)

    with pytest.raises(RuntimeError, match=r"tensors\[0\].*replaced"):
        _kernels.grad_norm(grads, 2.0, NormOutput(backend.device).tensors, replaces)
