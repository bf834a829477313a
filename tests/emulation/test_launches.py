"""How many kernels a call launches: one per pass for any number of tensors whose arguments fit into one launch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from benchmarks.shapes import ModelShapes, gpt2_small, many_small, resnet50
from steadygrad import _kernels
from tests.backends import BACKENDS, Backend, backend_parameters
from tests.optim.optimizer_runs import tensor_state
from tests.snapshots import assert_same_tree, bits

# The arguments of one launch of pass 1 hold 32 KB of gradient addresses and param groups.
GRADIENTS_PER_LAUNCH = 3500
GROUPS_PER_LAUNCH = 22
# The launches after pass 1 are the decision and the update.
DECIDE_AND_UPDATE = 2

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {}),
    "SGD-momentum": ("SGD", {"momentum": 0.9}),
    "SGD-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {}),
    "AdamW-amsgrad": ("AdamW", {"amsgrad": True}),
    "Adagrad": ("Adagrad", {}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop-centered": ("RMSprop", {"centered": True}),
    "RMSprop-momentum": ("RMSprop", {"momentum": 0.9}),
    "RMSprop-both": ("RMSprop", {"centered": True, "momentum": 0.9}),
}


@pytest.fixture
def device(backend: Backend) -> torch.device:
    """Return the device on which kernels are launched."""
    if not backend.asynchronous:
        pytest.skip("this backend launches no kernels")
    return backend.device


def launches(call: Callable[[], object]) -> int:
    before = _kernels.launch_count()
    call()
    return int(_kernels.launch_count() - before)


def parameters(model: ModelShapes, device: torch.device) -> list[Parameter]:
    """Return as many vectors as the model has tensors, with sizes in the same proportions but smaller."""
    shrink = 1 if model.key == "small" else 4096
    sizes = [max(1, math.prod(shape) // shrink) for shape in model.shapes]
    return [Parameter(torch.full((size,), 0.5, device=device)) for size in sizes]


def new_gradients(params: Sequence[Parameter], value: float) -> None:
    """Give every parameter a gradient in memory that no step has seen."""
    kept = [p.grad for p in params]  # keeps the old memory from being used again
    for param in params:
        param.grad = torch.full_like(param, value)
    assert all(
        a is None or a.data_ptr() != b.grad.data_ptr() for a, b in zip(kept, params, strict=True)
    )


def made(rule: str, params: Any, **ours: Any) -> Any:
    name, options = RULES[rule]
    return sg.Stabilizer(getattr(torch.optim, name)(params, lr=0.01, **options), **ours)


@pytest.mark.parametrize(
    ("model", "rule"),
    [*((resnet50(), rule) for rule in RULES), (gpt2_small(), "AdamW"), (many_small(), "AdamW")],
    ids=lambda value: getattr(value, "key", value),
)
def test_a_step_is_at_most_three_launches(
    device: torch.device, model: ModelShapes, rule: str
) -> None:
    params = parameters(model, device)
    optimizer = made(rule, params, max_norm=1.0)
    new_gradients(params, 1.0)
    first = launches(optimizer.step)
    # The gradients are in new memory, with the clip inactive and active.
    for value in (1e-7, 2.0):
        optimizer.zero_grad(set_to_none=True)
        new_gradients(params, value)
        steady = launches(optimizer.step)
        assert steady == 3 <= first
    assert optimizer.path == "fused"
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (0, 2)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_writes_gradients_is_four(device: torch.device, rule: str) -> None:
    params = parameters(resnet50(), device)
    optimizer = made(rule, params, max_norm=1.0, write_grads=True)
    counts = []
    for value in (1.0, 2.0, 1e-7):
        new_gradients(params, value)
        counts.append(launches(optimizer.step))
    assert counts[1:] == [4, 4] and counts[0] > 4


@pytest.mark.parametrize(
    "ours",
    [
        {"l1": 0.1, "l2": 0.1},
        {"l1": 0.1, "l1_mode": "proximal", "penalty_order": "after_clip"},
        {"clip_value": 0.1, "nonfinite": "zero"},
        {"clip_scope": "tensor", "nonfinite": "propagate"},
        {"norm_type": 1.0, "clip_scope": "group"},
        {"norm_type": math.inf},
    ],
    ids=lambda ours: "-".join(map(str, ours)),
)
def test_options_cost_no_launch(device: torch.device, ours: dict[str, Any]) -> None:
    params = parameters(resnet50(), device)
    optimizer = made("AdamW", params, **{"max_norm": 1.0, **ours})
    for value in (1.0, 2.0, math.nan, 1.0):
        new_gradients(params, value)
        count = launches(optimizer.step)
    assert count == 3


def test_a_general_norm_costs_two_more(device: torch.device) -> None:
    params = parameters(resnet50(), device)
    optimizer = made("AdamW", params, max_norm=1.0, norm_type=3.0)
    for value in (1.0, 2.0):
        new_gradients(params, value)
        count = launches(optimizer.step)
    assert count == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_cost_no_launch(device: torch.device, dtype: torch.dtype) -> None:
    mixed = [torch.float32, dtype]
    params = [Parameter(torch.ones(99, dtype=mixed[i % 2], device=device)) for i in range(161)]
    optimizer = made("AdamW", params, max_norm=1.0)
    for value in (1.0, 2.0):
        new_gradients(params, value)
        count = launches(optimizer.step)
    assert count == 3


def test_numbers_that_change_travel_with_the_launch(device: torch.device) -> None:
    params = parameters(resnet50(), device)
    optimizer = made("AdamW", params, max_norm=1.0)
    group = optimizer.param_groups[0]
    counts = []
    for step in range(4):
        new_gradients(params, 1.0)
        group["lr"] = 0.1 / (step + 1)
        group["max_norm"] = 1.0 + step
        group["betas"] = (0.5 + 0.1 * step, 0.9)
        group["l1"] = 0.1 * step
        optimizer.grad_scale = torch.tensor(2.0**step, device=device)
        optimizer.found_inf = torch.tensor(float(step == 2), device=device)
        counts.append(launches(optimizer.step))
    assert counts[1:] == [3, 3, 3]


def test_only_a_change_of_tensors_is_told_to_the_device(device: torch.device) -> None:
    params = parameters(resnet50(), device)
    optimizer = made("AdamW", params, max_norm=1.0)

    def count(without: Sequence[int] = ()) -> int:
        new_gradients(params, 1.0)
        for index in without:
            params[index].grad = None
        return launches(optimizer.step)

    assert count() > 3
    assert [count(), count()] == [3, 3]
    assert count(without=[1, 5]) > 3
    assert [count(without=[1, 5]), count(without=[1, 5])] == [3, 3]
    assert count() > 3
    params[3].data = params[3].data.clone()
    assert count() > 3
    assert [count(), count()] == [3, 3]


def test_several_optimizers_do_not_disturb_each_other(device: torch.device) -> None:
    sets = [parameters(resnet50(), device) for _ in range(3)]
    rules = ("AdamW", "SGD-momentum", "AdamW")
    optimizers = [made(rule, some, max_norm=1.0) for rule, some in zip(rules, sets, strict=True)]
    for turn in range(3):
        for some, optimizer in zip(sets, optimizers, strict=True):
            new_gradients(some, 1.0)
            count = launches(optimizer.step)
            assert turn == 0 or count == 3


def pieces(groups_of_tensors: Sequence[int], group_count: int) -> int:
    """Return the launches of pass 1 for tensors of these param groups, in order; empty groups are sent, too."""
    count, first_group, gradients = 1, 0, 0
    for group in groups_of_tensors:
        while gradients == GRADIENTS_PER_LAUNCH or group >= first_group + GROUPS_PER_LAUNCH:
            count, gradients = count + 1, 0
            first_group = min(group, first_group + GROUPS_PER_LAUNCH)
        gradients += 1
    left = max(0, group_count - first_group - GROUPS_PER_LAUNCH)
    return count + -(-left // GROUPS_PER_LAUNCH)


def many_groups(counts: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """Return param groups of so many parameters, each with its own options, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(len(counts))
    sizes = itertools.cycle([1, 5, 3, 0, 2, 129])
    return [
        {
            "params": [
                Parameter(torch.randn(next(sizes), generator=generator).to(device))
                for _ in range(count)
            ],
            "lr": 0.01 * (g + 1),
            "max_norm": 0.5 + 0.1 * (g % 7),
            "l2": 0.01 * (g % 3),
        }
        for g, count in enumerate(counts)
    ]


def run_groups(
    backend: Backend, rule: str, counts: Sequence[int], scope: str, bare: Sequence[int]
) -> tuple[list[int], list[Tensor], Any, list[Tensor]]:
    """Take two steps, without gradients for the groups in ``bare``; return launches, parameters, state, norms."""
    with backend.active():
        groups = many_groups(counts, backend.device)
        optimizer = made(rule, groups, clip_scope=scope)
        generator = torch.Generator().manual_seed(0)
        launched, norms = [], []
        for _ in range(2):
            for g, group in enumerate(optimizer.param_groups):
                for param in group["params"]:
                    gradient = torch.randn(param.shape, generator=generator).to(param.device)
                    param.grad = None if g in bare else gradient
            launched.append(launches(optimizer.step))
            norms.append(optimizer.grad_norm)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return launched, [bits(p) for p in params], tensor_state(optimizer), norms


OTHERS = backend_parameters(BACKENDS[1:])


@pytest.mark.parametrize(
    ("counts", "bare", "passes"),
    [
        ([3501], [], 2),
        ([4000], [], 2),
        ([1] * 22, [], 1),
        ([1] * 23, [], 2),
        ([1] * 60, [], 3),
        ([1] * 60, [g for g in range(60) if g not in (0, 30, 59)], 3),
        ([1] * 60, [*range(40)], 3),
        ([1] * 60, [*range(20, 60)], 3),
        ([2] * 21 + [3499] + [2] * 36, [], 3),
    ],
    ids=lambda value: str(sum(value)) if isinstance(value, list) and value else None,
)
@pytest.mark.parametrize("other", OTHERS)
def test_what_one_launch_cannot_hold_is_split(
    other: Backend, counts: list[int], bare: list[int], passes: int
) -> None:
    rule = "AdamW" if sum(counts) < 3500 else "SGD-momentum"
    groups = [g for g, count in enumerate(counts) for _ in range(count) if g not in bare]
    assert pieces(groups, len(counts)) == passes
    launched, params, state, norms = run_groups(other, rule, counts, "group", bare)
    _, want, want_state, want_norms = run_groups(BACKENDS[0], rule, counts, "group", bare)
    assert launched[1] == passes + DECIDE_AND_UPDATE < launched[0]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(norms, want_norms, strict=True))
    if other.name == "cuda":  # its compiler may fuse a product and a sum
        return
    assert all(torch.equal(a, b) for a, b in zip(params, want, strict=True))
    assert_same_tree(state, want_state)


@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_functions_bring_their_table_with_each_call(device: torch.device, norm_type: float) -> None:
    params = parameters(resnet50(), device)
    new_gradients(params, 1.0)
    grads = [p.grad for p in params if p.grad is not None]
    general = 0 if norm_type == 2.0 else 2
    for _ in range(2):
        # These are the table, pass 1 and the decision; then pass 2.
        assert launches(lambda: sg.get_total_norm(grads, norm_type)) == 3 + general
        assert launches(lambda: sg.clip_grad_norm_(params, math.inf, norm_type)) == 3 + general
        assert launches(lambda: sg.clip_grad_norm_(params, 1.0, norm_type)) == 4 + general
        # Only the device knows whether the clip is active.
        assert launches(lambda: sg.clip_grad_norm_(params, 1e9, norm_type)) == 4 + general


def test_functions_of_one_pass(device: torch.device) -> None:
    params = parameters(resnet50(), device)
    new_gradients(params, 1.0)
    norm = torch.tensor(5.0, device=device)
    assert launches(lambda: sg.clip_grads_with_norm_(params, 1.0, norm)) == 2
    assert launches(lambda: sg.clip_grads_with_norm_(params, 1.0, 5.0)) == 2
    assert launches(lambda: sg.clip_grad_value_(params, 0.1)) == 2
    assert launches(lambda: sg.soft_threshold_(params, 0.1)) == 2
    # The penalty's value is added up in a launch of its own.
    assert launches(lambda: sg.add_penalty_(params, l1=0.1, l2=0.1)) <= 3


def test_nothing_to_do_is_nothing_launched(device: torch.device) -> None:
    params = parameters(resnet50(), device)
    new_gradients(params, 1.0)
    assert launches(lambda: sg.clip_grads_with_norm_(params, 1.0, 0.5)) == 0
    assert launches(lambda: sg.soft_threshold_(params, 0.0)) == 0
    assert launches(lambda: sg.get_total_norm([])) == 0
    assert launches(lambda: sg.clip_grad_norm_([], 1.0)) == 0


def test_more_tensors_than_one_upload_takes(device: torch.device) -> None:
    params = [Parameter(torch.full((2,), 0.5, device=device)) for _ in range(4000)]
    new_gradients(params, 3.0)
    count = launches(lambda: sg.clip_grad_norm_(params, 1.0))
    # A tensor takes at most 10 words, and a launch has 4,092.
    assert 4 < count <= 3 + 10
    total = sg.get_total_norm([p.grad for p in params if p.grad is not None])
    assert total.item() == pytest.approx(1.0, rel=1e-6)
