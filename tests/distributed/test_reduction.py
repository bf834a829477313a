"""The hook between the passes: what it gets, what it decides, and that a step waits for nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from steadygrad import _kernels
from steadygrad.clip import device_of
from steadygrad.distributed.norms import COLUMNS
from steadygrad.memory import NormOutput, allocator
from tests.backends import Backend

SHAPES = ((33,), (5, 7), (0, 3), (8193,), ())
SMALL, MEDIUM, LARGE, NONFINITE, NAN = range(COLUMNS)

Change = Callable[[Tensor], None]


class Hook:
    """Replaces the sum over processes."""

    def __init__(self, change: Change, rows: int, counted: list[int], device: torch.device) -> None:
        self.change = change
        self.seen: list[Tensor] = []
        self.rows = torch.full((rows, COLUMNS), math.nan, dtype=torch.float64, device=device)
        self.counted = torch.tensor(counted, dtype=torch.int32, device=device)

    @property
    def reduction(self) -> _kernels.Reduction:
        return _kernels.Reduction(rows=self.rows, counted=self.counted, reduce=self)

    def __call__(self) -> None:
        self.seen.append(self.rows.clone())
        self.change(self.rows)


def unchanged(rows: Tensor) -> None:
    """Change nothing, as if no other process held anything."""


def optimizer_of(backend: Backend, **options: Any) -> tuple[list[Parameter], sg.optim.SGD]:
    generator = torch.Generator().manual_seed(1)
    params = [Parameter(torch.randn(s, generator=generator).to(backend.device)) for s in SHAPES]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = sg.optim.SGD(groups, lr=1.0, momentum=0.9, telemetry=None, **options)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(backend.device)
    return params, optimizer


class HookedSharding:
    """Replaces the sharding of a stepper, with a hook in it."""

    def __init__(self, hook: Hook) -> None:
        self.reduction = hook.reduction

    def gradients(self, sums: dict[Tensor, Tensor]) -> None:
        return None


def hooked(
    optimizer: sg.optim.SGD,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    counted: tuple[int, ...] = (1, 1, 1, 1, 1),
) -> Hook:
    per_tensor = optimizer._options.clip_scope == "tensor"
    device = optimizer.param_groups[0]["params"][0].device
    hook = Hook(change, 3 + (len(SHAPES) if per_tensor else 0), list(counted), device)
    monkeypatch.setattr(
        "steadygrad.optim.step.sharding_of", lambda *arguments: HookedSharding(hook)
    )
    return hook


def norm_of(grads: list[Tensor | None], p: float) -> float:
    whole = torch.cat([g.double().flatten() for g in grads if g is not None])
    return float(torch.linalg.vector_norm(whole, p))


def snapshot(params: list[Parameter], optimizer: sg.optim.SGD) -> list[Tensor]:
    states = [v for s in optimizer.state.values() for v in s.values() if v is not None]
    return [t.detach().clone() for t in [*params, *states]]


@pytest.mark.kernels
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.0])
def test_rows_hold_what_this_process_counts(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, scope: str, p: float
) -> None:
    params, optimizer = optimizer_of(backend, clip_scope=scope, norm_type=p)
    hook = hooked(optimizer, monkeypatch, unchanged, counted=(1, 0, 1, 1, 1))
    optimizer.step()
    (rows,) = hook.seen
    grads = [param.grad for param in params]
    scopes = [grads[:1], grads[2:], *([[g] for g in grads] if scope == "tensor" else [])]
    for row, members in zip(rows[1:], scopes, strict=True):
        counted = [g for g in members if g is not grads[1]]
        exact = norm_of(counted, p) if sum(g.numel() for g in counted if g is not None) else 0.0
        exact = exact**p if p in (1, 2) else exact
        torch.testing.assert_close(float(row[MEDIUM]), exact, rtol=1e-12, atol=0)
    assert not rows[:, [SMALL, LARGE, NONFINITE, NAN]].any()
    assert rows[0, MEDIUM] == 0


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
def test_a_hook_that_changes_nothing_gives_the_bits_of_a_step_without(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, scope: str, p: float
) -> None:
    options: dict[str, Any] = {"clip_scope": scope, "norm_type": p, "max_norm": 0.5, "l2": 0.1}
    same, alone = optimizer_of(backend, **options)
    for _ in range(2):
        alone.step()
    params, optimizer = optimizer_of(backend, **options)
    hooked(optimizer, monkeypatch, unchanged)
    for _ in range(2):
        optimizer.step()
    for a, b in zip(snapshot(params, optimizer), snapshot(same, alone), strict=True):
        if scope == "global":  # sums over groups and then over all have another order
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(a, b)
    assert optimizer.clipped_steps == alone.clipped_steps == 2


@pytest.mark.kernels
def test_what_comes_back_decides(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def four_processes(rows: Tensor) -> None:
        rows.mul_(4)

    params, optimizer = optimizer_of(backend, max_norm=1.0)
    hooked(optimizer, monkeypatch, four_processes)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    grads = [param.grad for param in params]
    norm = 2 * norm_of(grads, 2.0)
    assert optimizer.grad_norm is not None
    torch.testing.assert_close(float(optimizer.grad_norm), norm, rtol=1e-6, atol=0)
    for param, old, grad in zip(params, before, grads, strict=True):
        assert grad is not None
        torch.testing.assert_close(old - param.detach(), grad / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("row", "column"), [(0, MEDIUM), (0, NONFINITE), (2, NONFINITE), (2, NAN)])
def test_another_process_may_skip_the_step(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, row: int, column: int
) -> None:
    def spoilt(rows: Tensor) -> None:
        rows[row, column] += 1
        rows[row, NONFINITE] += column == NAN

    params, optimizer = optimizer_of(backend, max_norm=1.0)
    hooked(optimizer, monkeypatch, spoilt)
    before = snapshot(params, optimizer)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for a, b in zip(snapshot(params, optimizer), before, strict=True):
        assert torch.equal(a, b)
    assert optimizer.grad_norm is not None
    assert bool(optimizer.grad_norm.isfinite()) == (column == MEDIUM)


def test_what_no_process_counts_is_told_all_the_same(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = optimizer_of(backend, max_norm=1.0)
    hook = hooked(optimizer, monkeypatch, unchanged, counted=(0, 1, 1, 1, 1))
    grad = params[0].grad
    assert grad is not None
    grad[3] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert hook.seen[0][:, NONFINITE].tolist() == [1, 0, 0]


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_an_error_in_the_hook_leaves_everything(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, nonfinite: str
) -> None:
    def broken(rows: Tensor) -> None:
        raise ConnectionError("the other one is gone")

    params, optimizer = optimizer_of(backend, max_norm=1.0, nonfinite=nonfinite)
    optimizer.step()
    optimizer.param_groups[1]["params"] = list(params[2:])  # a new plan uses the hook, too
    hook = hooked(optimizer, monkeypatch, broken)
    optimizer._current_stepper()._plan = None
    before = snapshot(params, optimizer)
    with pytest.raises(ConnectionError, match="the other one is gone"):
        optimizer.step()
    for a, b in zip(snapshot(params, optimizer), before, strict=True):
        assert torch.equal(a, b)
    hook.change = unchanged
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not torch.equal(params[0].detach(), before[0])


def test_a_step_without_gradients_calls_it(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = optimizer_of(backend, max_norm=1.0)
    hook = hooked(optimizer, monkeypatch, unchanged)
    for param in params:
        param.grad = None
    optimizer.step()
    assert len(hook.seen) == 1
    assert not hook.seen[0].any()
    assert optimizer.grad_norm == 0


@pytest.mark.kernels
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.0, 0.0, -math.inf, -2.0])
def test_functions_on_lists(backend: Backend, p: float) -> None:
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(s, generator=generator).to(backend.device) for s in ((40,), (0,), (9, 9))]
    for count, exact in (
        (1, norm_of([grads[0], grads[2]], p)),
        (0, norm_of([grads[2]], p)),
    ):
        hook = Hook(unchanged, 2, [count, 1, 1], backend.device)
        output = NormOutput(device_of(grads))
        arguments = (p, output.tensors, allocator(device_of(grads)), hook.reduction)
        norm = _kernels.grad_norm(grads, *arguments)[0]
        torch.testing.assert_close(float(output.result(norm, wide=True)), exact, rtol=1e-9, atol=0)
        assert len(hook.seen) == 1


@pytest.mark.kernels
@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_squares_beyond_float64_are_added_up(backend: Backend, size: float) -> None:
    grads = [torch.full((4,), size, dtype=torch.float64, device=backend.device)]
    hook = Hook(lambda rows: rows.mul_(4), 2, [1], backend.device)
    output = NormOutput(device_of(grads))
    norm = _kernels.grad_norm(
        grads, 2.0, output.tensors, allocator(device_of(grads)), hook.reduction
    )[0]
    torch.testing.assert_close(float(output.result(norm, wide=True)), 4 * size, rtol=1e-12, atol=0)


def test_one_more_launch(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if not backend.asynchronous:
        pytest.skip("this backend launches no kernels")
    _, optimizer = optimizer_of(backend, max_norm=1.0)
    hooked(optimizer, monkeypatch, unchanged)
    optimizer.step()
    optimizer.step()
    before = _kernels.launch_count()
    optimizer.step()
    # These are the norm, the rows, the decision and the update.
    assert _kernels.launch_count() - before == 4


@pytest.mark.kernels
def test_rows_of_another_size_are_refused(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = optimizer_of(backend)
    hook = hooked(optimizer, monkeypatch, unchanged)
    hook.rows = hook.rows[:2]
    before = snapshot(params, optimizer)
    with pytest.raises(TypeError, match="step: rows: expected a contiguous float64 tensor of 15"):
        optimizer.step()
    for a, b in zip(snapshot(params, optimizer), before, strict=True):
        assert torch.equal(a, b)
