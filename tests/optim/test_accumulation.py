"""Gradient accumulation: sums in fp32, one norm, the clip of the mean, and nothing kept after the step."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import steadygrad as sg
from steadygrad.reference.norm import total_norm
from tests.backends import Backend
from tests.optim.device_twins import asynchronous_device, no_waiting
from tests.optim.micro_batches import (
    DTYPES,
    HALF,
    add,
    all_dtypes,
    all_kinds,
    backward,
    batches,
    half_dtypes,
    mean_of,
)
from tests.optim.optimizer_kinds import MAKERS, make_twin
from tests.optim.optimizer_runs import assert_same_params, assert_same_state
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import Snapshot, assert_refused, bits, same_bits
from tests.tolerances import assert_close, assert_rounded, float64

# -- the sum and its division -------------------------------------------------------------------


@half_dtypes
def test_64_micro_batches_lose_nothing_but_their_own_rounding(
    backend: Backend, dtype: torch.dtype
) -> None:
    param = Parameter(torch.zeros(4099, dtype=dtype, device=backend.device))
    optimizer = sg.optim.SGD([param], lr=1.0, max_norm=math.inf, write_grads=True)
    # As in training, the mean of the gradients is far below their noise.
    grads = [[(torch.randn(4099) + 0.1).to(dtype).to(backend.device)] for _ in range(64)]
    add(optimizer, [param], grads)
    exact = mean_of(grads)[0]
    total = float64(optimizer.accumulated.sums[param]) / 64
    naive = Parameter(torch.zeros_like(param))
    for batch in grads:
        backward([naive], batch)
    optimizer.step()
    magnitude = abs(exact).max()
    ours = abs(total - exact).max() / magnitude
    theirs = abs(float64(naive.grad) / 64 - exact).max() / magnitude
    assert ours < 1e-6 and theirs > 1e-3 and theirs > 2000 * ours, (ours, theirs)
    # The update used the exact mean, rounded once.
    assert_rounded(param.grad, exact, abs(exact) + 1.0, torch.float32)
    assert optimizer.grad_norm.item() == pytest.approx(total_norm([exact]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@all_kinds
def test_steps_equal_those_of_one_large_batch(
    backend: Backend, kind: str, dtype: torch.dtype
) -> None:
    mine, theirs = (dense_parameters(dtype, backend.device) for _ in range(2))
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    for step in range(8):
        grads = batches(mine, 4, seed=step)
        ours.zero_grad()
        add(ours, mine, grads)
        ours.step()
        for param, mean in zip(theirs, mean_of(grads), strict=True):
            param.grad = torch.tensor(mean, dtype=dtype, device=backend.device)
        norm = clip_grad_norm_(theirs, 1.0)
        torchs.step()
        assert_close(ours.grad_norm, norm, dtype)
    assert (ours.path == backend.fused_path) == (kind != "in-place")
    assert_same_params(mine, theirs, dtype)
    assert_same_state(ours, torchs, dtype)


@half_dtypes
@all_kinds
def test_steps_of_half_precision_equal_those_of_one_batch(
    backend: Backend, kind: str, dtype: torch.dtype
) -> None:
    # Equal micro-batches have a mean without rounding, so that every bit can be compared.
    sets = [dense_parameters(dtype, backend.device) for _ in range(2)]
    optimizers = [MAKERS[kind](some, max_norm=1.0) for some in sets]
    for step in range(5):
        grads = batches(sets[0], 1, seed=step)[0]
        for some, optimizer, count in zip(sets, optimizers, (8, 1), strict=True):
            optimizer.zero_grad()
            add(optimizer, some, [grads] * count)
            optimizer.step()
    plain = dense_parameters(dtype, backend.device)
    once = MAKERS[kind](plain, max_norm=1.0)
    for step in range(5):
        once.zero_grad()
        backward(plain, batches(plain, 1, seed=step)[0])
        once.step()
    for many, one, without in zip(*sets, plain, strict=True):
        assert torch.equal(bits(many), bits(one)) and torch.equal(bits(many), bits(without))
    assert optimizers[0].clipped_steps == once.clipped_steps > 0


@pytest.mark.parametrize("weights", [None, [5.0, 0.0, 2.0, 0.25]])
@pytest.mark.parametrize("decay", [1.0, 0.6])
@all_dtypes
@all_kinds
def test_weights_and_decay_are_those_of_the_reference(
    backend: Backend, kind: str, dtype: torch.dtype, decay: float, weights: list[float] | None
) -> None:
    params = dense_parameters(dtype, backend.device)
    optimizer = MAKERS[kind](params, max_norm=math.inf)
    grads = batches(params, 4)
    for batch, weight in zip(grads, weights or [1.0] * 4, strict=True):
        with sg.accumulate(optimizer, weight=weight, decay=decay):
            backward(params, batch)
    optimizer.step()
    want = total_norm(mean_of(grads, weights=weights, decay=decay))
    assert optimizer.grad_norm.item() == pytest.approx(want, rel=1e-6)


def test_a_model_of_several_dtypes(backend: Backend) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    params = [Parameter(torch.ones(50, dtype=d, device=backend.device)) for d in dtypes]
    params[3].requires_grad_(False)
    optimizer = sg.optim.AdamW(params, lr=0.1, max_norm=0.5)
    for step in range(3):
        grads = batches(params[:3], 4, seed=step)
        optimizer.zero_grad()
        add(optimizer, params[:3], grads, decay=0.9)
        assert optimizer.accumulated.sums.keys() == {params[1], params[2]}
        assert [p.grad is None for p in params] == [False, True, True, True]
        optimizer.step()
        want = total_norm(mean_of(grads, decay=0.9))
        assert optimizer.grad_norm.item() == pytest.approx(want, rel=1e-6)
    assert optimizer.path == backend.fused_path and optimizer.clipped_steps == 3
    assert torch.equal(params[3], torch.ones_like(params[3]))


@pytest.mark.kernels
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, None], ids=str)
@all_kinds
def test_parameters_whose_gradients_have_another_dtype(
    backend: Backend, kind: str, grad_dtype: torch.dtype | None
) -> None:
    param = Parameter(torch.zeros(3, dtype=torch.bfloat16 if grad_dtype is None else torch.float32))
    if kind == "in-place" and grad_dtype is not None:
        pytest.skip("torch's NAdam does not take them")
    if not hasattr(param, "grad_dtype"):
        pytest.skip("in this torch gradients have the dtype of their parameters")
    param = Parameter(param.detach().to(backend.device))
    param.grad_dtype = grad_dtype
    optimizer = MAKERS[kind]([param], max_norm=math.inf, write_grads=True)
    add(optimizer, [param], [[torch.full_like(param.detach(), k)] for k in (1, 2, 6)])
    assert param.grad is None and optimizer.accumulated.sums[param].tolist() == [9, 9, 9]
    optimizer.step()
    assert param.grad.dtype == torch.bfloat16 and param.grad.tolist() == [3, 3, 3]


@all_kinds
def test_the_clip_is_that_of_the_mean(backend: Backend, kind: str) -> None:
    # The norm of the sum exceeds the limit, and that of the mean does not.
    for dtype in DTYPES:
        param = Parameter(torch.zeros(4, dtype=dtype, device=backend.device))
        optimizer = MAKERS[kind]([param], lr=1.0, max_norm=3.0)
        add(optimizer, [param], [[torch.ones_like(param.detach())]] * 4)
        optimizer.step()
        assert optimizer.grad_norm.item() == 2.0 and optimizer.clipped_steps == 0


# -- with a GradScaler --------------------------------------------------------------------------


@all_dtypes
@all_kinds
def test_with_a_grad_scaler(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    def params_of() -> list[Parameter]:
        return dense_parameters(dtype, backend.device)

    plain, scaled = params_of(), params_of()
    optimizers = [MAKERS[kind](some, max_norm=1.0) for some in (plain, scaled)]
    # The fp16 gradients themselves must not overflow.
    scaler = sg.GradScaler(backend.device.type, init_scale=64.0, growth_interval=2)
    scales = []
    for step, bad in enumerate([None, None, math.inf, None, math.nan, None]):
        grads = batches(plain, 4, seed=step)
        if bad is None:
            optimizers[0].zero_grad()
            add(optimizers[0], plain, grads)
            optimizers[0].step()
        else:
            next(g for g in grads[2] if g is not None).fill_(bad)
        optimizers[1].zero_grad()
        for batch in grads:
            with sg.accumulate(optimizers[1]):
                backward(scaled, batch, scaler)
        scaler.step(optimizers[1])
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [64, 128, 64, 64, 32, 32] and optimizers[1].skipped_steps == 2
    assert_close(optimizers[1].grad_norm, optimizers[0].grad_norm, optimizers[1].grad_norm.dtype)
    if dtype in HALF:  # scales are powers of two: only subnormal fp16 may differ
        assert dtype == torch.float16 or all(map(same_bits, plain, scaled))
    else:
        assert_same_params(scaled, plain, dtype)


@pytest.mark.parametrize("unscale", [False, True])
def test_with_the_scaler_of_torch(backend: Backend, unscale: bool) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.optim.SGD(params, lr=1.0, max_norm=math.inf)
    scaler = torch.amp.GradScaler(backend.device.type)
    grads = batches(params, 4)
    for batch in grads:
        with sg.accumulate(optimizer):
            backward(params, batch, scaler)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.grad_norm.item() == pytest.approx(total_norm(mean_of(grads)), rel=1e-6)


def test_scalers_that_look_at_grad_only_are_refused(backend: Backend) -> None:
    params = dense_parameters(torch.bfloat16, backend.device)
    optimizer = sg.optim.SGD(params, lr=1.0)
    theirs, ours = torch.amp.GradScaler(backend.device.type), sg.GradScaler(backend.device.type)
    with sg.accumulate(optimizer):
        backward(params, batches(params, 1)[0], theirs)
    before = Snapshot(params, optimizer)
    assert_refused(
        lambda: theirs.step(optimizer),
        RuntimeError,
        function="step",
        argument="found_inf",
        expected=r"steadygrad\.GradScaler",
        got="0$",
        unchanged=[before],
    )
    ours.scale(torch.zeros((), device=backend.device))
    assert_refused(
        lambda: ours.unscale_(optimizer),
        RuntimeError,
        function="unscale_",
        argument="optimizer",
        expected=r"in \.grad",
        got="half-precision",
        unchanged=[before],
    )
    ours.step(optimizer)
    assert not optimizer.accumulated.sums


# -- what is kept, and for how long -------------------------------------------------------------


@pytest.mark.kernels
@half_dtypes
@all_kinds
def test_memory_is_freed_by_the_step(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    params = dense_parameters(dtype, backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    add(optimizer, params, batches(params, 2))
    assert all(p.grad is None for p in params)
    sums = [weakref.ref(total) for total in optimizer.accumulated.sums.values()]
    assert len(sums) == len(params)
    gc.disable()  # the sums have to be freed by their reference counts alone
    try:
        optimizer.step()
        assert [ref() for ref in sums] == [None] * len(sums)
    finally:
        gc.enable()
    # The in-place path needed the gradients in .grad.
    assert all((p.grad is None) == (kind != "in-place") for p in params)


@pytest.mark.parametrize("set_to_none", [True, False])
@all_dtypes
@all_kinds
def test_zero_grad_drops_it(
    backend: Backend, kind: str, dtype: torch.dtype, set_to_none: bool
) -> None:
    params = dense_parameters(dtype, backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    for seed in range(3):
        add(optimizer, params, batches(params, 3, seed=seed), weight=7.0)
        optimizer.zero_grad(set_to_none=set_to_none)
        grads = batches(params, 2, seed=seed + 10)
        add(optimizer, params, grads)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(total_norm(mean_of(grads)), rel=1e-6)
        optimizer.zero_grad(set_to_none=set_to_none)


def test_steps_without_accumulation_are_as_before(backend: Backend) -> None:
    for dtype in DTYPES:
        params = dense_parameters(dtype, backend.device)
        optimizer = sg.optim.SGD(params, lr=0.1)
        add(optimizer, params, batches(params, 3))
        optimizer.step()
        optimizer.zero_grad()
        grads = batches(params, 2)
        for batch in grads:
            backward(params, batch)
        sums = [float64(p.grad) for p in params]
        optimizer.step(lambda: None)
        assert optimizer.grad_norm.item() == pytest.approx(total_norm(sums), rel=1e-6)


def test_write_grads_writes_the_mean(backend: Backend) -> None:
    for dtype in DTYPES:
        params = dense_parameters(dtype, backend.device)
        optimizer = sg.optim.AdamW(params, max_norm=1.0, write_grads=True)
        grads = batches(params, 3)
        add(optimizer, params, grads)
        optimizer.step()
        means = mean_of(grads)
        factor = min(1.0, 1.0 / (total_norm(means) + 1e-6))
        for param, mean in zip(params, means, strict=True):
            assert_rounded(param.grad, mean * factor, abs(mean * factor) + 1.0, torch.float32)


def test_sparse_gradients_stay_sparse(backend: Backend) -> None:
    if backend.name == "cuda":
        pytest.skip("the same code as on the CPU")
    weight = Parameter(torch.ones(8, 3))
    optimizer = sg.Stabilizer(torch.optim.SGD([weight], lr=1.0), max_norm=math.inf)
    for row in (1, 1, 5, 1):
        with sg.accumulate(optimizer):
            chosen = torch.nn.functional.embedding(torch.tensor([row]), weight, sparse=True)
            chosen.sum().backward()
    optimizer.step()
    assert optimizer.path == "in-place: sparse gradients"
    assert weight[:, 0].tolist() == [1, 0.25, 1, 1, 1, 0.75, 1, 1]


def test_two_optimizers_at_once(backend: Backend) -> None:
    sets = [dense_parameters(torch.bfloat16, backend.device, seed) for seed in range(2)]
    first, second = (sg.optim.SGD(some, lr=0.1) for some in sets)
    grads = [batches(some, 3, seed=seed) for seed, some in enumerate(sets)]
    for some in zip(*grads, strict=True):
        with sg.accumulate(first), sg.accumulate(second, weight=2):
            backward([*sets[0], *sets[1]], [*some[0], *some[1]])
    first.step()
    second.step()
    for optimizer, some, weight in ((first, grads[0], 1.0), (second, grads[1], 2.0)):
        want = total_norm(mean_of(some, weights=[weight] * 3))
        assert optimizer.grad_norm.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_of_tokens_on_the_device_are_not_waited_for(
    backend: Backend, dtype: torch.dtype
) -> None:
    device = asynchronous_device(backend)
    params = dense_parameters(dtype, device)
    optimizer = sg.optim.AdamW(params, max_norm=1.0)
    scaler = sg.GradScaler(device.type, init_scale=64.0)
    scaler.scale(torch.zeros((), device=device))
    tokens = [torch.tensor(count, device=device) for count in (12, 0, 7)]
    grads = batches(params, 3)
    with no_waiting(device):
        for batch, count in zip(grads, tokens, strict=True):
            with sg.accumulate(optimizer, weight=count, decay=0.5):
                backward(params, batch, scaler)
        scaler.step(optimizer)
        scaler.update()
    want = total_norm(mean_of(grads, weights=[12, 0, 7], decay=0.5))
    assert optimizer.grad_norm.item() == pytest.approx(want, rel=1e-6)
    # If the host cannot know that the weights add up to 0, the step is skipped.
    add(optimizer, params, grads, weight=torch.zeros((), device=device))
    before = [bits(p) for p in params]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(bits(p), kept) for p, kept in zip(params, before, strict=True))
