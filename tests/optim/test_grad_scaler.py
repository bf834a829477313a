"""GradScaler has torch's skips, scales and weights, with found_inf from the step instead of a pass of its own."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import steadygrad as sg
from steadygrad.reference.norm import total_norm
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.device_twins import RULES, asynchronous_device, no_waiting
from tests.optim.optimizer_kinds import MAKERS, give, make_twin
from tests.optim.optimizer_runs import assert_same_params, assert_same_state, make_ours, make_torch
from tests.optim.parameter_sets import dense_parameters, gradient_sequence
from tests.snapshots import Snapshot, assert_refused, assert_same_tree
from tests.tolerances import float64

STEPS = 26
# Overflows happen once, twice in a row, in different parameters, and as NaN.
OVERFLOWS = {5: math.inf, 6: -math.inf, 12: math.nan, 15: math.inf, 16: math.inf, 21: math.nan}
SCALERS = {"torch": torch.amp.GradScaler, "ours": sg.GradScaler}
scalers = pytest.mark.parametrize("scaler", SCALERS)
all_kinds = pytest.mark.parametrize("kind", MAKERS)
# Every fused rule, and one of torch's rules that uses its own step.
ALL_RULES = {**RULES, "in-place": ("NAdam", {"lr": 0.01})}


class Operations(TorchDispatchMode):
    """Records the names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def inf_checks(self) -> int:
        return sum("_amp_foreach_non_finite_check" in name for name in self.names)


def backward(scaler: Any, params: Sequence[Parameter], grads: Sequence[Tensor | None]) -> None:
    """Run backward of a loss whose gradients are these."""
    losses = [(p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None]
    scaler.scale(torch.stack(losses).sum()).backward()


def overflowing(params: Sequence[Parameter], steps: int = STEPS) -> list[list[Tensor | None]]:
    sequence = gradient_sequence(params, steps, seed=1, decades=4.0)
    for step, value in OVERFLOWS.items():
        if step < steps:
            given = [g for g in sequence[step] if g is not None]
            given[step % len(given)].view(-1)[-1:] = value
    return sequence


def steady(params: Sequence[Parameter]) -> list[list[Tensor | None]]:
    return gradient_sequence(params, 3, seed=2, decades=0.0)


def run(
    scaler: Any, optimizer: Any, params: list[Parameter], clips: bool, unscales: bool = False
) -> list[float]:
    """Take all steps, in torch's way if ``clips``; return the scales."""
    scales = []
    for grads in overflowing(params):
        optimizer.zero_grad()
        backward(scaler, params, grads)
        if clips or unscales:
            scaler.unscale_(optimizer)
        if clips:
            clip_grad_norm_([p for p in params if p.grad is not None], 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def made(backend: Backend, scaler: str = "ours", **arguments: Any) -> Any:
    return SCALERS[scaler](backend.device.type, growth_interval=4, **arguments)


@cache
def run_of_torch(rule: str, device: torch.device) -> tuple[list[float], list[Parameter], Any]:
    """Return the scales, the parameters and the optimizer of torch's own run."""
    name, options = ALL_RULES[rule]
    params = dense_parameters(device=device)
    optimizer = make_torch(name, params, options)
    scaler = torch.amp.GradScaler(device.type, growth_interval=4)
    return run(scaler, optimizer, params, clips=True), params, optimizer


@pytest.mark.parametrize("unscales", [False, True], ids=["step-only", "unscale_"])
@pytest.mark.parametrize("rule", ALL_RULES)
@scalers
def test_same_skips_scales_and_weights_as_torch(
    backend: Backend, scaler: str, rule: str, unscales: bool
) -> None:
    name, options = ALL_RULES[rule]
    mine = dense_parameters(device=backend.device)
    ours = make_ours(name, mine, options, wrap=unscales, max_norm=1.0)
    if rule == "in-place":
        ours = sg.Stabilizer(unfused.NAdam(mine, **options), max_norm=1.0)
    got = run(made(backend, scaler), ours, mine, clips=False, unscales=unscales)
    want, theirs, torchs = run_of_torch(rule, backend.device)
    assert got == want
    assert min(want) < 2.0**16 < max(want) and len(set(want)) >= 5
    assert ours.skipped_steps == len(OVERFLOWS)
    assert (ours.path == backend.fused_path) == (rule != "in-place")
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
@all_kinds
def test_a_step_takes_no_pass_to_look_for_infinities(
    backend: Backend, kind: str, bad: float | None
) -> None:
    params = dense_parameters(device=backend.device)
    optimizer, scaler = MAKERS[kind](params, max_norm=1.0), made(backend)
    scaler.scale(torch.zeros((), device=backend.device))
    give(params, element=bad)
    with Operations() as operations:
        scaler.step(optimizer)
        scaler.update()
    assert operations.inf_checks == 0
    assert scaler.get_scale() == 2.0 ** (16 if bad is None else 15)
    # The same count sees torch's own pass, so that a change in how torch's scaler asks would be noticed.
    give(params)
    with Operations() as operations:
        made_by_torch = made(backend, "torch")
        made_by_torch.scale(torch.zeros((), device=backend.device))
        made_by_torch.step(optimizer)
    assert operations.inf_checks == 1


def test_nothing_waits_for_the_device(backend: Backend) -> None:
    device = asynchronous_device(backend)
    params = dense_parameters(device=device)
    optimizer, scaler = sg.optim.AdamW(params, max_norm=1.0), made(backend)
    scaler.scale(torch.zeros((), device=device))
    for bad in (None, math.inf, None, None):
        give(params, element=bad)
        with no_waiting(device):
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 2.0**15 and optimizer.skipped_steps == 1


@pytest.mark.parametrize("policy", ["skip", "zero", "raise", "propagate"])
@scalers
@all_kinds
def test_an_overflow_is_skipped_under_every_policy(
    backend: Backend, kind: str, scaler: str, policy: str
) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0, nonfinite=policy)
    scaling = made(backend, scaler)
    scaling.scale(torch.zeros((), device=backend.device))
    give(params)
    scaling.step(optimizer)
    scaling.update()
    give(params, element=math.inf)
    before = Snapshot(params, optimizer, counters=False)
    scaling.step(optimizer)
    scaling.update()
    before.assert_unchanged()
    assert optimizer.skipped_steps == 1 and scaling.get_scale() == 2.0**15
    if scaler == "torch":
        return
    # Without the scaler the policy is the one that was given.
    give(params, element=math.inf)
    if policy == "raise":
        with pytest.raises(sg.NonfiniteGradientError):
            optimizer.step()
    else:
        optimizer.step()
    finite = bool(torch.isfinite(params[-1]).all())
    assert finite == (policy != "propagate")
    assert optimizer.skipped_steps == (2 if policy == "skip" else 1)


@all_kinds
def test_several_optimizers(backend: Backend, kind: str) -> None:
    def make(stabilized: bool) -> tuple[list[list[Parameter]], list[Any]]:
        sets = [dense_parameters(device=backend.device, seed=seed) for seed in range(3)]
        # The last set uses torch's own optimizer in either case.
        ours = [MAKERS[kind](some, max_norm=math.inf) for some in sets[:2]] if stabilized else []
        return sets, ours + [make_twin(kind, some) for some in sets[len(ours) :]]

    def step(scaler: Any, sets: list[list[Parameter]], optimizers: list[Any]) -> list[float]:
        scales = []
        for bad in (None, 0, 1, 2, None, None, None, None, None):
            for index, some in enumerate(sets):
                optimizers[index].zero_grad()
                grads = gradient_sequence(some, 1, seed=index, decades=0.0)[0]
                if bad == index:
                    grads[-1] = torch.full_like(some[-1], math.inf)
                backward(scaler, some, grads)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    mine, ours = make(True)
    theirs, torchs = make(False)
    assert step(made(backend), mine, ours) == step(made(backend, "torch"), theirs, torchs)
    assert [optimizer.skipped_steps for optimizer in ours[:2]] == [1, 1]
    for some, others in zip(mine, theirs, strict=True):
        assert_same_params(some, others, torch.float32)


def test_optimizers_of_torch_are_stepped_as_torch_does(backend: Backend) -> None:
    results = []
    for scaler in ("ours", "torch"):
        params = dense_parameters(device=backend.device)
        optimizer = torch.optim.AdamW(params, lr=0.01)
        scales = run(made(backend, scaler), optimizer, params, clips=True)
        results.append((scales, params, optimizer.state_dict()))
    assert_same_tree(results[0], results[1])


@all_kinds
def test_gradients_that_overflow_after_unscale(backend: Backend, kind: str) -> None:
    # User code between unscale_ and step may also make gradients non-finite; the step and the scale see it.
    params = dense_parameters(device=backend.device)
    optimizer, scaler = MAKERS[kind](params, max_norm=1.0), made(backend)
    backward(scaler, params, steady(params)[0])
    scaler.unscale_(optimizer)
    assert params[-1].grad is not None
    params[-1].grad.fill_(math.inf)
    before = Snapshot(params)
    scaler.step(optimizer)
    before.assert_unchanged()
    scaler.update()
    assert scaler.get_scale() == 2.0**15


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "in-place"])
def test_gradients_in_float16(backend: Backend, kind: str) -> None:
    param = Parameter(torch.ones(1000, dtype=torch.float16, device=backend.device))
    optimizer, scaler = MAKERS[kind]([param], max_norm=1.0), made(backend)
    values = torch.randn(1000, device=backend.device).half()
    scaler.scale(torch.zeros((), device=backend.device))
    param.grad = values
    scaler.step(optimizer)
    scaler.update()
    want = total_norm([float64(values) / 65536.0])
    assert optimizer.grad_norm.item() == pytest.approx(want, rel=2.0**-23, abs=0.0)
    param.grad = torch.full_like(values, math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15


def test_sparse_gradients(backend: Backend) -> None:
    if backend.name == "cuda":
        pytest.skip("the same code as on the CPU")
    weight = Parameter(torch.ones(8, 3))
    optimizer, scaler = (
        sg.Stabilizer(torch.optim.SGD([weight], lr=1.0), max_norm=1.0),
        made(backend),
    )
    for value, scale in ((2.0, 2.0**16), (math.inf, 2.0**15)):
        optimizer.zero_grad()
        chosen = torch.nn.functional.embedding(torch.tensor([1, 1]), weight, sparse=True)
        scaler.scale((chosen * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    # Both entries are one row: a gradient of 4 in three places, clipped to 1.
    assert weight[1].tolist() == pytest.approx([1 - 1 / math.sqrt(3)] * 3, rel=1e-6)
    assert optimizer.path == "in-place: sparse gradients" and optimizer.skipped_steps == 1


@all_kinds
def test_a_step_without_gradients_finds_none(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    scaler = sg.GradScaler(backend.device.type, growth_interval=1)
    scaler.scale(torch.zeros((), device=backend.device))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**17 and optimizer.skipped_steps == 0


@pytest.mark.parametrize("by_name", [True, False])
@all_kinds
def test_closures_are_refused(backend: Backend, kind: str, by_name: bool) -> None:
    params = dense_parameters(device=backend.device)
    optimizer, scaler = MAKERS[kind](params, max_norm=1.0), made(backend)
    scaler.scale(torch.zeros((), device=backend.device))
    give(params)
    before = Snapshot(params, optimizer)
    with pytest.raises(RuntimeError, match=r"(?i)closure"):
        if by_name:
            scaler.step(optimizer, closure=lambda: 0.0)
        else:
            scaler.step(optimizer, lambda: 0.0)
    before.assert_unchanged()


@all_kinds
def test_no_closure_may_be_said_by_place(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer, scaler = MAKERS[kind](params, max_norm=1.0), made(backend)
    scaler.scale(torch.zeros((), device=backend.device))
    give(params)
    scaler.step(optimizer, None)  # accelerate passes None
    scaler.update()
    assert optimizer.grad_norm is not None


@all_kinds
def test_calls_in_the_wrong_order_are_refused_as_by_torch(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer, scaler = MAKERS[kind](params, max_norm=1.0), made(backend)
    with pytest.raises(AssertionError, match="scale"):
        scaler.step(optimizer)
    backward(scaler, params, steady(params)[0])
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        scaler.unscale_(optimizer)


@all_kinds
def test_a_refused_step_leaves_no_scale_behind(backend: Backend, kind: str) -> None:
    mine, theirs = (dense_parameters(device=backend.device) for _ in range(2))
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    scaler = made(backend)
    grads = steady(mine)[0]
    backward(scaler, mine, grads)
    ours.param_groups[0]["max_norm"] = -1.0
    before = Snapshot(mine, ours)
    assert_refused(
        lambda: scaler.step(ours),
        ValueError,
        function="step",
        argument=r"param_groups\[0\]: max_norm",
        expected="a number >= 0",
        got="-1.0",
        unchanged=[before],
    )
    assert not {"grad_scale", "found_inf"} & vars(ours).keys()
    ours.param_groups[0]["max_norm"] = 1.0
    scaler.step(ours)
    scaler.update()
    for param, grad in zip(theirs, grads, strict=True):
        param.grad = grad
    clip_grad_norm_([p for p in theirs if p.grad is not None], 1.0)
    torchs.step()
    assert_same_params(mine, theirs, torch.float32)


def test_what_was_set_by_hand_survives_a_refused_step() -> None:
    params = dense_parameters()
    optimizer, scaler = sg.optim.SGD(params, lr=0.1), sg.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    optimizer.grad_scale = torch.tensor(4.0)
    give(params)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr"):
        scaler.step(optimizer)
    assert optimizer.grad_scale.item() == 4.0 and "found_inf" not in vars(optimizer)


@pytest.mark.parametrize("cls", SCALERS.values(), ids=SCALERS)
def test_state_goes_both_ways(backend: Backend, cls: Any) -> None:
    def after(scaler: Any, steps: int) -> list[float]:
        params = dense_parameters(device=backend.device)
        optimizer = sg.optim.SGD(params, lr=0.1, max_norm=1.0)
        scales = []
        for grads in overflowing(params, 8)[:steps]:
            optimizer.zero_grad()
            backward(scaler, params, grads)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    saved = cls(backend.device.type, growth_interval=3, init_scale=64.0)
    after(saved, 5)  # one step into the next interval
    other = SCALERS["torch"] if cls is sg.GradScaler else sg.GradScaler
    loaded = other(backend.device.type)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    unpickled = pickle.loads(pickle.dumps(saved))
    assert type(unpickled) is cls
    assert loaded.state_dict() == unpickled.state_dict() == saved.state_dict()
    assert after(loaded, 8) == after(unpickled, 8) == after(saved, 8)


@all_kinds
def test_a_disabled_scaler_steps_and_takes_closures(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    scaler = sg.GradScaler(backend.device.type, enabled=False)

    def closure() -> float:
        give(params)
        return 7.0

    scaler.unscale_(optimizer)
    assert scaler.step(optimizer, closure) == 7.0
    scaler.update()
    assert scaler.state_dict() == {} and scaler.get_scale() == 1.0
    assert optimizer.grad_norm is not None


def test_arguments_are_those_of_torch() -> None:
    with pytest.raises(AssertionError, match="growth factor"):
        sg.GradScaler("cpu", growth_factor=1.0)
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="CUDA is not available"):
            assert not sg.GradScaler().is_enabled()
