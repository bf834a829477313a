"""What accumulation refuses, what may be tried again, and what needs a fresh start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import steadygrad as sg
from steadygrad.reference.norm import total_norm
from tests.backends import Backend
from tests.optim.micro_batches import (
    add,
    all_dtypes,
    all_kinds,
    backward,
    batches,
    half_dtypes,
    mean_of,
)
from tests.optim.optimizer_kinds import MAKERS
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import Snapshot, assert_refused, same_bits

# -- when a micro-batch, or a step, fails -------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, math.nan])
@all_dtypes
@all_kinds
def test_one_bad_micro_batch_skips_the_step(
    backend: Backend, kind: str, dtype: torch.dtype, value: float
) -> None:
    params = dense_parameters(dtype, backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    grads = batches(params, 3)
    assert grads[0][-1] is not None
    grads[0][-1].view(-1)[-1:] = value
    add(optimizer, params, grads)
    before = Snapshot(params, optimizer, counters=False)
    optimizer.step()
    before.assert_unchanged()
    assert optimizer.skipped_steps == 1 and not optimizer.accumulated.sums
    optimizer.zero_grad()
    grads = batches(params, 3, seed=1)
    add(optimizer, params, grads)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.grad_norm.item() == pytest.approx(total_norm(mean_of(grads)), rel=1e-6)


@all_dtypes
@all_kinds
def test_a_refused_step_can_be_taken_again(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    sets = [dense_parameters(dtype, backend.device) for _ in range(2)]
    optimizers = [MAKERS[kind](some, max_norm=1.0) for some in sets]
    for some, optimizer in zip(sets, optimizers, strict=True):
        add(optimizer, some, batches(some, 3))
    optimizers[0].param_groups[0]["max_norm"] = -1.0
    before = Snapshot(sets[0], optimizers[0])
    with pytest.raises(ValueError, match="max_norm"):
        optimizers[0].step()
    before.assert_unchanged()
    optimizers[0].param_groups[0]["max_norm"] = 1.0
    for optimizer in optimizers:
        optimizer.step()
    assert all(map(same_bits, *sets))


@all_dtypes
def test_gradients_that_are_refused_stay(backend: Backend, dtype: torch.dtype) -> None:
    params = dense_parameters(dtype, backend.device)
    optimizer = sg.optim.SGD(params, lr=0.1, nonfinite="raise")
    grads = batches(params, 2)
    add(optimizer, params, [*grads, [torch.full_like(p.detach(), math.nan) for p in params]])
    before = Snapshot(params, optimizer)
    for _ in range(2):
        with pytest.raises(sg.NonfiniteGradientError):
            optimizer.step()
        before.assert_unchanged()
    optimizer.zero_grad()
    add(optimizer, params, grads)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(total_norm(mean_of(grads)), rel=1e-6)


@all_kinds
def test_an_exception_inside_needs_a_new_start(backend: Backend, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = dense_parameters(dtype, backend.device)
        optimizer = MAKERS[kind](params, max_norm=1.0)
        grads = batches(params, 2)
        add(optimizer, params, grads)
        with pytest.raises(KeyError, match="data"), sg.accumulate(optimizer):
            backward(params, grads[1])
            raise KeyError("data")
        before = Snapshot(params, optimizer)
        for call in (optimizer.step, sg.accumulate(optimizer).__enter__):
            assert_refused(
                call,
                RuntimeError,
                function="step|accumulate",
                argument="accumulate",
                expected="complete micro-batches",
                got="KeyError",
                unchanged=[before],
            )
        optimizer.zero_grad()
        add(optimizer, params, grads)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(total_norm(mean_of(grads)), rel=1e-6)


# -- what is refused ----------------------------------------------------------------------------


@all_kinds
def test_calls_inside_a_micro_batch_are_refused(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    inside = {
        "step": optimizer.step,
        "zero_grad": optimizer.zero_grad,
        "accumulate": sg.accumulate(optimizer).__enter__,
    }
    for name, call in inside.items():
        with pytest.raises(RuntimeError, match=f"^{name}: .*inside"), sg.accumulate(optimizer):
            backward(params, batches(params, 1)[0])
            before = Snapshot(params, optimizer)
            try:
                call()
            finally:
                before.assert_unchanged()
        optimizer.zero_grad()


@half_dtypes
def test_a_backward_outside_is_refused(backend: Backend, dtype: torch.dtype) -> None:
    params = dense_parameters(dtype, backend.device)
    optimizer = sg.optim.SGD(params, lr=0.1)
    grads = batches(params, 2)
    add(optimizer, params, grads[:1])
    backward(params, grads[1])
    assert_refused(
        optimizer.step,
        RuntimeError,
        function="step",
        argument="accumulate",
        expected="every backward inside",
        got="from outside",
        unchanged=[Snapshot(params, optimizer)],
    )


@all_kinds
def test_closures_are_refused(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    add(optimizer, params, batches(params, 2))
    assert_refused(
        lambda: optimizer.step(lambda: 0.0),
        RuntimeError,
        function="step",
        argument="closure",
        expected="None after",
        got="function",
        unchanged=[Snapshot(params, optimizer)],
    )


@pytest.mark.parametrize(
    ("arguments", "error", "expected", "got"),
    [
        ({"weight": -1}, ValueError, "finite number >= 0", "-1"),
        ({"weight": math.nan}, ValueError, "finite number >= 0", "nan"),
        ({"weight": math.inf}, ValueError, "finite number >= 0", "inf"),
        ({"weight": "all"}, TypeError, "finite number >= 0", "'all'"),
        ({"weight": torch.ones(2)}, TypeError, "finite number >= 0", r"tensor\(\[1"),
        ({"decay": 0}, ValueError, "> 0 and <= 1", "0"),
        ({"decay": 1.5}, ValueError, "> 0 and <= 1", "1.5"),
        ({"decay": math.nan}, ValueError, "finite number", "nan"),
        ({"decay": None}, TypeError, "finite number", "None"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], expected: str, got: str
) -> None:
    params = dense_parameters()
    optimizer = sg.optim.SGD(params, lr=0.1)
    assert_refused(
        lambda: sg.accumulate(optimizer, **arguments).__enter__(),
        error,
        function="accumulate",
        argument=next(iter(arguments)),
        expected=expected,
        got=got,
    )
    add(optimizer, params, batches(params, 1))  # no micro-batch is open


def test_weights_that_are_all_zero_are_refused() -> None:
    params = dense_parameters()
    optimizer = sg.optim.SGD(params, lr=0.1)
    add(optimizer, params, batches(params, 2), weight=0)
    assert_refused(
        optimizer.step,
        ValueError,
        function="step",
        argument="accumulate",
        expected="more than 0",
        got="0",
        unchanged=[Snapshot(params, optimizer)],
    )


def test_optimizers_of_torch_are_refused() -> None:
    optimizer = torch.optim.SGD(dense_parameters(), lr=0.1)
    assert_refused(
        lambda: sg.accumulate(optimizer).__enter__(),
        TypeError,
        function="accumulate",
        argument="optimizer",
        expected=r"steadygrad\.Stabilizer",
        got="SGD",
    )
