"""On a GPU nothing waits, on any stream, and a captured graph steps as eager code does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import BACKENDS, Backend, backend_parameters
from tests.optim.device_twins import NAN, RULES, Twins, all_rules, both_ways
from tests.optim.optimizer_kinds import give
from tests.optim.optimizer_runs import plain_class, tensor_state
from tests.optim.parameter_sets import assign, dense_parameters, gradient_sequence, mixed_parameters
from tests.snapshots import assert_same_tree, bits

pytestmark = pytest.mark.parametrize("backend", backend_parameters(BACKENDS[2:]), indirect=True)

STEPS = 20
# torch's other classes have no such option; with fused steps they can be captured all the same.
CAPTURABLE = {"Adam-amsgrad", "AdamW", "RMSprop-both"}


def made(rule: str, params: Sequence[Parameter], wrap: bool = True, **ours: Any) -> Any:
    name, options = RULES[rule]
    if rule in CAPTURABLE:
        options = {**options, "capturable": True}
    ours = {"max_norm": 1.0, **ours}
    if wrap:
        return sg.Stabilizer(plain_class(name)(params, **options), **ours)
    return getattr(sg.optim, name)(params, **options, **ours)


def static_gradients(params: Sequence[Parameter]) -> list[Tensor]:
    """Set gradients in memory that stays in place, as a captured backward pass does."""
    for param in params:
        param.grad = torch.zeros_like(param)
    return [p.grad for p in params if p.grad is not None]


def sequence_for(params: Sequence[Parameter], steps: int, seed: int = 0) -> list[list[Tensor]]:
    """Return gradients for which the clip is active or not, with a NaN in two of the steps."""
    generator = torch.Generator().manual_seed(seed)
    sequence = []
    for step in range(steps):
        scale = 10.0 if step % 3 else 1e-3
        made_ = [torch.randn(p.shape, generator=generator) * scale for p in params]
        if step % 9 == 4:
            made_[-1].view(-1)[-1] = NAN
        sequence.append([g.to(p.device) for g, p in zip(made_, params, strict=True)])
    return sequence


def put(static: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for to, gradient in zip(static, gradients, strict=True):
        to.copy_(gradient)


def warm_up(
    optimizer: Any, static: Sequence[Tensor], sequence: Sequence[list[Tensor]]
) -> torch.cuda.Stream:
    """Step on a side stream, as torch's notes on graphs require."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for gradients in sequence:
            put(static, gradients)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    return side


def capture(optimizer: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def assert_same(ours: Any, mine: Sequence[Tensor], same: Any, expected: Sequence[Tensor]) -> None:
    for one, other in zip(mine, expected, strict=True):
        assert torch.equal(bits(one), bits(other))
    assert_same_tree(tensor_state(ours), tensor_state(same))
    assert (ours.skipped_steps, ours.clipped_steps) == (same.skipped_steps, same.clipped_steps)


@both_ways
@all_rules
@pytest.mark.parametrize("limit", [1.0, 1e4], ids=["active", "inactive"])
def test_no_step_of_twenty_waits(backend: Backend, limit: float, rule: str, wrap: bool) -> None:
    twins = Twins(rule, backend.device, wrap, max_norm=limit)
    twins.max_norm = limit
    for step in range(STEPS):
        twins.ours.zero_grad(set_to_none=True)
        twins.step(step, NAN if step in (0, 9) else None, guarded=True)
    assert (twins.ours.skipped_steps, twins.ours.clipped_steps) == (2, 18 if limit == 1.0 else 0)
    twins.assert_equal()


@all_rules
def test_a_replayed_graph_equals_eager_steps(backend: Backend, rule: str) -> None:
    mine, expected = (dense_parameters(device=backend.device) for _ in range(2))
    ours, same = made(rule, mine), made(rule, expected)
    static, eager = static_gradients(mine), static_gradients(expected)
    sequence = sequence_for(mine, STEPS + 3)
    warm_up(ours, static, sequence[:3])
    graph = capture(ours)
    norms = []
    for gradients in sequence[3:]:
        put(static, gradients)
        graph.replay()
        norms.append(ours.grad_norm.clone())
    for step, gradients in enumerate(sequence):
        put(eager, gradients)
        same.step()
        if step >= 3:
            want = same.grad_norm
            assert torch.equal(bits(norms[step - 3]), bits(want)) or want.isnan()
    assert_same(ours, mine, same, expected)
    assert ours.skipped_steps == 3


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master"])
def test_a_replayed_graph_rounds_as_eager_steps(backend: Backend, rounding: str) -> None:
    for rule in ("SGD", "AdamW"):
        mine, expected = (dense_parameters(torch.bfloat16, backend.device) for _ in range(2))
        ours, same = (made(rule, params, rounding=rounding) for params in (mine, expected))
        static, eager = static_gradients(mine), static_gradients(expected)
        sequence = [[g.bfloat16() for g in gradients] for gradients in sequence_for(mine, 12)]
        warm_up(ours, static, sequence[:3])
        graph = capture(ours)
        for step, gradients in enumerate(sequence):
            put(eager, gradients)
            same.step()
            if step >= 3:
                put(static, gradients)
                graph.replay()
        assert_same(ours, mine, same, expected)
        for one, other in zip(ours.param_groups, same.param_groups, strict=True):
            assert one.get("rounded_steps") == other.get("rounded_steps")


def test_replays_and_eager_steps_take_turns(backend: Backend) -> None:
    for rule in ("AdamW", "SGD-dampened"):
        mine, expected = (dense_parameters(device=backend.device) for _ in range(2))
        ours, same = made(rule, mine), made(rule, expected)
        static, eager = static_gradients(mine), static_gradients(expected)
        sequence = sequence_for(mine, 16, seed=1)
        warm_up(ours, static, sequence[:2])
        graph = capture(ours)
        for step, gradients in enumerate(sequence):
            put(eager, gradients)
            same.step()
            if step < 2:
                continue
            put(static, gradients)
            if step % 4 < 2:
                graph.replay()
            elif step % 4 == 2:
                ours.step()
            else:  # the gradients are not those of the graph
                assign(mine, [g.clone() for g in gradients])
                ours.step()
                assign(mine, static)
        assert_same(ours, mine, same, expected)


def test_a_graph_outlives_the_plan_it_was_captured_with(backend: Backend) -> None:
    # Other parameters get gradients, so that a new plan is made; then the graph steps again.
    mine, expected = (dense_parameters(device=backend.device) for _ in range(2))
    ours, same = made("SGD-dampened", mine), made("SGD-dampened", expected)
    sequence = sequence_for(mine, 12, seed=2)
    for some in (mine, expected):
        static_gradients(some)
        some[0].grad = None
    held = [p.grad for p in mine]
    side = warm_up(ours, held[1:], [g[1:] for g in sequence[:2]])  # type: ignore[arg-type]
    graph = capture(ours)
    late = torch.zeros_like(mine[0])
    filler = []
    for step, gradients in enumerate(sequence):
        whole = step in (4, 7)
        expected[0].grad = gradients[0].clone() if whole else None
        put([p.grad for p in expected[1:]], gradients[1:])  # type: ignore[misc]
        same.step()
        if step < 2:
            continue
        put(held[1:], gradients[1:])  # type: ignore[arg-type]
        if whole:
            mine[0].grad = late.copy_(gradients[0])
            ours.step()
            mine[0].grad = None
        else:
            graph.replay()
        # Memory that was freed is now used by others.
        for stream in (side, torch.cuda.current_stream()):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                filler += [torch.full((n,), 7.0, device=backend.device) for n in (4, 64, 256, 4096)]
    torch.cuda.synchronize()
    assert all(torch.all(tensor == 7.0) for tensor in filler)
    assert_same(ours, mine, same, expected)


def test_a_captured_rate_and_scale_are_followed(backend: Backend) -> None:
    mine, expected = (dense_parameters(device=backend.device) for _ in range(2))
    rate = torch.tensor(0.1, device=backend.device)
    scale, found_inf = torch.ones((), device=backend.device), torch.zeros((), device=backend.device)
    inner = torch.optim.AdamW(mine, lr=rate, capturable=True)
    ours = sg.Stabilizer(inner, max_norm=1.0)
    same = made("AdamW", expected)
    static, eager = static_gradients(mine), static_gradients(expected)
    ours.grad_scale, ours.found_inf = scale, found_inf
    sequence = sequence_for(mine, 8, seed=3)
    graph = None
    for step, gradients in enumerate(sequence):
        rate.fill_(0.5**step)
        scale.fill_(4.0**step)
        found_inf.fill_(float(step == 5))
        put(static, [g * 4.0**step for g in gradients])
        if step < 2:
            warm_up(ours, static, [[g * 4.0**step for g in gradients]])
        else:
            graph = graph or capture(ours)
            graph.replay()
        if step == 5:
            continue
        same.param_groups[0]["lr"] = 0.5**step
        put(eager, gradients)
        same.step()
    assert ours.skipped_steps == same.skipped_steps + 1
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_functions_in_a_graph(backend: Backend) -> None:
    params, expected = (mixed_parameters(device=backend.device) for _ in range(2))
    static = static_gradients(params)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sg.clip_grad_norm_(params, 1.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = sg.clip_grad_norm_(params, 1.0)
    for gradients in gradient_sequence(params, 2):
        pairs = zip(gradients, params, strict=True)
        dense = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        put(static, dense)
        graph.replay()
        assign(expected, [g.clone() for g in dense])
        assert torch.equal(norm, sg.clip_grad_norm_(expected, 1.0))
        for one, other in zip(static, expected, strict=True):
            assert other.grad is not None
            assert torch.equal(bits(one), bits(other.grad))


@all_rules
def test_steps_follow_the_current_stream(backend: Backend, rule: str) -> None:
    mine, expected = ([Parameter(torch.zeros(1 << 20, device=backend.device))] for _ in range(2))
    ours, same = made(rule, mine), made(rule, expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    results = []
    for step in range(6):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # the step has to come after this
            mine[0].grad = torch.full_like(mine[0], NAN if step == 2 else step + 1.0)
            ours.step()
            results.append((mine[0][:3].clone(), ours.grad_norm))
    stream.synchronize()
    for step, (got, norm) in enumerate(results):
        expected[0].grad = torch.full_like(expected[0], NAN if step == 2 else step + 1.0)
        same.step()
        assert torch.equal(got, expected[0][:3])
        assert math.isnan(norm.item()) if step == 2 else norm == same.grad_norm
    assert_same(ours, mine, same, expected)


def test_a_plans_memory_is_recorded_on_other_streams(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else torch would give it away, as soon as it grows or the plan ends, while that stream still reads it."""
    record = Tensor.record_stream
    recorded: list[torch.Stream] = []

    def observe(tensor: Tensor, stream: torch.Stream) -> None:
        recorded.append(stream)
        record(tensor, stream)

    monkeypatch.setattr(Tensor, "record_stream", observe)
    params = dense_parameters(device=backend.device)
    optimizer = made("AdamW", params)
    put(static_gradients(params), sequence_for(params, 1)[0])
    optimizer.step()
    assert recorded == []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
        optimizer.step()
    assert recorded == [side]
    torch.cuda.current_stream().wait_stream(side)


def test_a_step_without_gradients_follows_the_current_stream(backend: Backend) -> None:
    # Without gradients to take the device from, the stream has to be the parameters' all the same.
    params = dense_parameters(device=backend.device)
    optimizer = made("AdamW", params)
    static = static_gradients(params)
    warm_up(optimizer, static, sequence_for(params, 1))
    optimizer.zero_grad(set_to_none=True)
    graph = capture(optimizer)
    graph.replay()
    assert optimizer.grad_norm.item() == 0.0


@all_rules
def test_the_second_gpu(backend: Backend, rule: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    assert torch.cuda.current_device() == 0
    mine, expected = dense_parameters(device="cuda:1"), dense_parameters(device="cuda:0")
    ours, same = made(rule, mine), made(rule, expected)
    for seed, bad in enumerate([None, NAN, None]):
        for some, optimizer in ((mine, ours), (expected, same)):
            give(some, seed, bad)
            norm = sg.get_total_norm([p.grad for p in some])  # type: ignore[misc]
            optimizer.step()
            assert optimizer.grad_norm.device == norm.device == some[0].device
    ours.zero_grad(set_to_none=True)
    ours.step()
    same.zero_grad(set_to_none=True)
    same.step()
    assert ours.grad_norm.item() == 0.0 and ours.grad_norm.device == mine[0].device
    assert torch.cuda.current_device() == 0
    assert_same(ours, mine, same, expected)
