"""What a step does around the update: policies, counters, norms, versions, schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import steadygrad as sg
from tests.backends import Backend
from tests.optim.optimizer_kinds import MAKERS, give, make_twin
from tests.optim.optimizer_runs import assert_same_params, assert_same_state, tensor_state
from tests.optim.parameter_sets import assign, dense_parameters, gradient_sequence
from tests.snapshots import Snapshot, bits
from tests.tolerances import assert_close

pytestmark = pytest.mark.parametrize("kind", MAKERS)

NONFINITE = [math.nan, math.inf, -math.inf]


def pair(backend: Backend) -> tuple[list[Parameter], list[Parameter]]:
    return dense_parameters(device=backend.device), dense_parameters(device=backend.device)


@pytest.mark.parametrize("element", NONFINITE)
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
def test_skip_changes_nothing_bit_for_bit(
    backend: Backend, kind: str, element: float, warm: bool
) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0, l1=1e-3, l2=1e-3)
    if warm:
        for seed in range(3):
            give(params, seed)
            optimizer.step()
    give(params, 9, element)
    snapshot = Snapshot(params, optimizer, counters=False)
    # torch's Adagrad makes its state in the constructor, all others in their first step.
    assert warm or kind == "Adagrad" or not optimizer.state_dict()["state"]
    for skips in (1, 2):
        optimizer.step()
        snapshot.assert_unchanged()
        assert optimizer.skipped_steps == skips
        assert optimizer.clipped_steps == (3 if warm else 0)
    assert not math.isfinite(optimizer.grad_norm)


@pytest.mark.parametrize("element", NONFINITE)
def test_training_after_a_skip_equals_torch_without_that_step(
    backend: Backend, kind: str, element: float
) -> None:
    mine, theirs = pair(backend)
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    for seed in range(12):
        bad = seed in (0, 5, 6)
        give(mine, seed, element if bad else None)
        ours.step()
        if not bad:
            give(theirs, seed)
            clip_grad_norm_(theirs, 1.0)
            torchs.step()
    assert ours.skipped_steps == 3
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_one_bad_tensor_skips_all_whatever_the_scope(
    backend: Backend, kind: str, scope: str
) -> None:
    params = dense_parameters(device=backend.device)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = MAKERS[kind](groups, max_norm=1.0, clip_scope=scope)
    give(params, 0, math.nan)
    snapshot = Snapshot(params, optimizer, counters=False)
    optimizer.step()
    snapshot.assert_unchanged()
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("element", NONFINITE)
def test_zero_counts_bad_elements_as_zero(backend: Backend, kind: str, element: float) -> None:
    mine, theirs = pair(backend)
    ours, torchs = MAKERS[kind](mine, max_norm=1.0, nonfinite="zero"), make_twin(kind, theirs)
    for seed in range(4):
        give(mine, seed, element)
        ours.step()
        give(theirs, seed, 0.0)
        norm = clip_grad_norm_(theirs, 1.0)
        torchs.step()
        assert_close(ours.grad_norm, norm, torch.float32)
    assert ours.skipped_steps == 0 and ours.clipped_steps == 4
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


@pytest.mark.parametrize("element", NONFINITE)
def test_raise_raises_and_changes_nothing(backend: Backend, kind: str, element: float) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0, nonfinite="raise")
    for warm in (False, True):
        if warm:
            give(params, 1)
            optimizer.step()
        give(params, 0, element)
        snapshot = Snapshot(params, optimizer)
        with pytest.raises(RuntimeError, match="finite"):
            optimizer.step()
        snapshot.assert_unchanged()


@pytest.mark.parametrize("element", NONFINITE)
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_propagate_does_what_torch_does(
    backend: Backend, kind: str, element: float, max_norm: float | None
) -> None:
    mine, theirs = pair(backend)
    ours = MAKERS[kind](mine, max_norm=max_norm, nonfinite="propagate")
    torchs = make_twin(kind, theirs)
    for seed in range(3):
        give(mine, seed, element if seed == 1 else None)
        ours.step()
        give(theirs, seed, element if seed == 1 else None)
        if max_norm is not None:
            clip_grad_norm_(theirs, max_norm)
        torchs.step()
    assert ours.skipped_steps == 0
    assert any(not torch.isfinite(p).all() for p in mine)
    assert_same_params(mine, theirs, torch.float32)


def test_found_inf_of_two_devices_skips_under_every_policy(backend: Backend, kind: str) -> None:
    for nonfinite in ("skip", "zero", "raise", "propagate"):
        params = dense_parameters(device=backend.device)
        optimizer = MAKERS[kind](params, max_norm=1.0, nonfinite=nonfinite)
        for found_inf in (1.0, 2.0, 3.0):
            give(params)
            snapshot = Snapshot(params, optimizer, counters=False)
            optimizer.found_inf = torch.tensor(found_inf, device=backend.device)
            optimizer.step()
            snapshot.assert_unchanged()
        assert optimizer.skipped_steps == 3
        optimizer.found_inf = torch.zeros((), device=backend.device)
        optimizer.step()
        assert (optimizer.skipped_steps == 3 and tensor_state(optimizer)) or kind == "SGD"


def test_finite_gradients_beyond_float32_are_no_reason_to_skip(backend: Backend, kind: str) -> None:
    mine, theirs = ([Parameter(torch.ones(1000, device=backend.device))] for _ in range(2))
    for nonfinite in ("skip", "raise", "zero"):
        ours, torchs = (
            MAKERS[kind](mine, max_norm=1.0, nonfinite=nonfinite),
            make_twin(kind, theirs),
        )
        mine[0].grad = torch.full((1000,), 3e38, device=backend.device)
        theirs[0].grad = torch.full((1000,), 1000**-0.5, device=backend.device)
        ours.step()
        torchs.step()
        assert ours.skipped_steps == 0 and ours.clipped_steps == 1
        assert_same_params(mine, theirs, torch.float32)


def test_gradients_of_3e19_keep_their_direction(backend: Backend, kind: str) -> None:
    mine, theirs = ([Parameter(torch.ones(4, device=backend.device))] for _ in range(2))
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    direction = torch.tensor([3.0, -4.0, 0.0, 12.0], device=backend.device)
    mine[0].grad, theirs[0].grad = direction * 1e19, direction / 13.0
    ours.step()
    torchs.step()
    assert_same_params(mine, theirs, torch.float32)
    assert ours.grad_norm.item() == pytest.approx(13e19)


def test_the_fused_path_does_not_write_gradients(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1e-3, clip_value=1e-4, l1=0.1, l2=0.1)
    give(params)
    before = [(p.grad, bits(p.grad), p.grad._version) for p in params if p.grad is not None]
    optimizer.step()
    if kind == "in-place":  # that path writes gradients, as its name says
        assert optimizer.path.startswith("in-place: ")
        return
    assert optimizer.path == "fused"
    for param, (gradient, old, version) in zip(params, before, strict=True):
        assert param.grad is gradient
        assert torch.equal(bits(gradient), old) and gradient._version == version


def test_write_grads_writes_the_clipped_gradient(backend: Backend, kind: str) -> None:
    mine, theirs = pair(backend)
    optimizer = MAKERS[kind](mine, max_norm=0.5, write_grads=True)
    give(mine)
    give(theirs)
    optimizer.step()
    clip_grad_norm_(theirs, 0.5)
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert_close(one.grad, other.grad, torch.float32)


def test_counters(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = MAKERS[kind](groups, max_norm=1.0)
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (0, 0)
    scales = [10.0, 1e-3, math.nan, 10.0, 1e-3, math.inf]
    for scale in scales:
        give(params)
        for param in params:
            assert param.grad is not None
            param.grad.mul_(scale)
        optimizer.step()
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (2, 2)
    assert isinstance(optimizer.skipped_steps, int) and isinstance(optimizer.clipped_steps, int)
    for group in optimizer.param_groups:
        assert (group["skipped_steps"], group["clipped_steps"]) == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_grad_norm(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    params = dense_parameters(dtype, backend.device)
    optimizer = MAKERS[kind](params, max_norm=1e-2)
    before = optimizer.grad_norm
    assert f"{before:.3f}" == "nan" and not optimizer.has_stepped
    assert before.dim() == 0 and before.device == backend.device
    assert before.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    kept: list[tuple[Tensor, float]] = []
    for seed in range(3):
        give(params, seed)
        norm = sg.get_total_norm([p.grad for p in params if p.grad is not None])
        optimizer.step()
        got = optimizer.grad_norm
        assert got.dim() == 0 and got.device == backend.device and not got.requires_grad
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(got, norm)
        kept.append((got, got.item()))
    # Norms that were collected in a list keep their values.
    assert all(tensor.item() == value for tensor, value in kept)


def test_grad_norm_is_global_and_after_the_penalty_before_the_clip(
    backend: Backend, kind: str
) -> None:
    for order, scope in (("before_clip", "tensor"), ("after_clip", "group")):
        params = dense_parameters(device=backend.device)
        penalized = dense_parameters(device=backend.device)
        optimizer = MAKERS[kind](
            params, max_norm=0.1, l1=0.3, l2=0.2, penalty_order=order, clip_scope=scope
        )
        give(params)
        give(penalized)
        if order == "before_clip":
            sg.add_penalty_(penalized, l1=0.3, l2=0.2)
        want = sg.get_total_norm([p.grad for p in penalized if p.grad is not None])
        optimizer.step()
        assert_close(optimizer.grad_norm, want, torch.float32)


def test_the_norm_is_taken_without_a_limit(backend: Backend, kind: str) -> None:
    mine, theirs = pair(backend)
    ours, torchs = MAKERS[kind](mine), make_twin(kind, theirs)
    give(mine)
    give(theirs)
    norm = sg.get_total_norm([p.grad for p in mine if p.grad is not None])
    ours.step()
    torchs.step()
    assert torch.equal(ours.grad_norm, norm) and ours.clipped_steps == 0
    assert_same_params(mine, theirs, torch.float32)


def test_parameters_without_gradients_take_no_part(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0, l1=1.0, l1_mode="proximal")
    give(params)
    params[1].grad = params[3].grad = None
    before = [bits(p) for p in params]
    optimizer.step()
    for index, (param, old) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(bits(param), old) == (index in (1, 3))
    state = tensor_state(optimizer)
    assert all(float(state[i]["step"]) == 0 for i in (1, 3) if i in state)
    assert kind == "Adagrad" or not {1, 3} & set(state)


def test_no_gradients_at_all(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0, l2=1.0)
    snapshot = Snapshot(params, optimizer)
    optimizer.step()
    snapshot.assert_unchanged()
    assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == 0.0


def test_limits_can_be_scheduled_and_differ_per_group(backend: Backend, kind: str) -> None:
    mine, theirs = pair(backend)
    ours = MAKERS[kind]([{"params": mine[:2], "max_norm": 0.3}, {"params": mine[2:]}], max_norm=2.0)
    assert [group["max_norm"] for group in ours.param_groups] == [0.3, 2.0]
    torchs = make_twin(kind, theirs)
    for seed, limits in enumerate([(0.3, 2.0), (0.1, None), (1e9, 0.5), (0.0, math.inf)]):
        for group, limit in zip(ours.param_groups, limits, strict=True):
            group["max_norm"] = limit
        give(mine, seed)
        give(theirs, seed)
        norm = sg.get_total_norm([p.grad for p in mine if p.grad is not None])
        ours.step()
        for params, limit in zip((theirs[:2], theirs[2:]), limits, strict=True):
            if limit is not None:
                sg.clip_grads_with_norm_(params, limit, norm)
        torchs.step()
    assert_same_params(mine, theirs, torch.float32)
    assert ours.clipped_steps == 4


def test_a_used_parameter_raises_in_backward_after_the_step(backend: Backend, kind: str) -> None:
    param = Parameter(torch.ones(6, device=backend.device))
    optimizer = MAKERS[kind]([param], max_norm=1.0)
    square = (param * param).sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_schedulers_advance_on_skipped_steps(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for _ in range(3):
        give(params, 0, math.nan)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.025, 0.0125, 0.00625] and optimizer.skipped_steps == 3


def test_the_result_is_the_same_in_every_run_and_for_every_number_of_threads(
    backend: Backend, kind: str
) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 1, 3):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(0)
            params = [Parameter(torch.randn(70_001, generator=generator).to(backend.device))]
            optimizer = MAKERS[kind](params, max_norm=1.0, l2=1e-3)
            for gradients in gradient_sequence(params, 3):
                assign(params, gradients)
                optimizer.step()
            results.append(bits(params[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
