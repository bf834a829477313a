"""Every backend gives the same bits, of norms, penalties and whole steps, in whatever order threads run."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import BACKENDS, Backend, backend_parameters
from tests.optim import unfused
from tests.optim.optimizer_runs import tensor_state
from tests.optim.parameter_sets import (
    assign_copies,
    gradient_sequence,
    like_layout,
    mixed_parameters,
    with_gradients,
)
from tests.snapshots import assert_same_tree, bits, same_bits

CPU, EMULATED, _ = BACKENDS
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF = math.inf

OTHERS = backend_parameters(BACKENDS[1:])
others = pytest.mark.parametrize("other", OTHERS)
# A GPU's compiler may fuse a product and a sum, and its powers may be rounded differently.
on_host = pytest.mark.parametrize("other", OTHERS[:1])

Result = TypeVar("Result")


def on(backend: Backend, call: Callable[[], Result]) -> Result:
    with backend.active():
        return call()


def on_both(other: Backend, call: Callable[[torch.device], Sequence[Tensor]]) -> None:
    """Run the call on the CPU and on the other backend, and compare all tensors that it returns."""
    want = on(CPU, lambda: call(CPU.device))
    got = on(other, lambda: call(other.device))
    assert len(got) == len(want) > 0
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == other.device
        same = torch.equal(bits(a), bits(b)) or (a.isnan().all() and b.isnan().all())
        assert same, f"result {index}: {a} is not {b}"


# The decades of element magnitudes, from where squares vanish in fp32 (or fp64) to where they overflow.
DECADES = {torch.float32: 7.5, torch.float64: 60.0, torch.bfloat16: 7.5, torch.float16: 0.9}
SPECIAL = [None, None, None, None, math.nan, INF, -INF, 0.0, -0.0]
shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from([[129], [4099], [8191], [8192], [8193], [3, 5, 1201], [25000]]),
)
drawn_lists = st.lists(
    st.tuples(
        shapes,
        st.sampled_from(DTYPES),
        st.integers(0, 6),  # layouts: those of like_layout, expanded, a slice
        st.integers(-5, 5),
        st.sampled_from(SPECIAL),
        st.integers(0, 10_000),
    ),
    max_size=7,
)
Drawn = list[tuple[list[int], torch.dtype, int, int, Any, int]]


def tensors_of(drawn: Drawn, device: torch.device, writable: bool) -> list[Tensor]:
    tensors = []
    for shape, dtype, layout, decade, special, seed in drawn:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = (values * 10.0 ** (decade * DECADES[dtype])).to(dtype)
        if values.numel() and special is not None:
            values.view(-1)[seed % values.numel()] = special
        values = values.to(device)
        if layout == 5 and not writable:
            tensors.append(values.unsqueeze(0).expand(3, *values.shape))
        elif layout == 6:
            offset = seed % 8
            wide = torch.full((values.numel() + offset + 3,), 7.0, dtype=dtype, device=device)
            view = wide[offset : offset + values.numel()].view(values.shape)
            tensors.append(view.copy_(values))
        else:
            tensors.append(like_layout(values, layout % 5))
    return tensors


@others
@given(drawn=drawn_lists, p=st.sampled_from([2.0, 1.0, INF, -INF, 0.0]))
@settings(max_examples=150)
def test_norms(other: Backend, drawn: Drawn, p: float) -> None:
    on_both(other, lambda device: [sg.get_total_norm(tensors_of(drawn, device, writable=False), p)])


@others
@given(
    drawn=drawn_lists,
    p=st.sampled_from([2.0, 2.0, 1.0, INF, -INF, 0.0]),
    limit=st.sampled_from([1.0, 0.0, 1e-3, 1e-30, 1e30, INF]),
)
@settings(max_examples=100)
def test_clipped_gradients(other: Backend, drawn: Drawn, p: float, limit: float) -> None:
    def clip(device: torch.device) -> list[Tensor]:
        gradients = tensors_of(drawn, device, writable=True)
        norm = sg.clip_grad_norm_(with_gradients(gradients), limit, p)
        return [norm, *gradients]

    if drawn:
        on_both(other, clip)


@on_host
@given(drawn=drawn_lists, p=st.sampled_from([3.0, 0.5, 7.0, -1.0, -2.5]))
@settings(max_examples=80)
def test_general_norms(other: Backend, drawn: Drawn, p: float) -> None:
    on_both(other, lambda device: [sg.get_total_norm(tensors_of(drawn, device, writable=False), p)])


@others
@pytest.mark.parametrize("p", [2.0, 1.0, INF, -INF, 0.0])
def test_norms_of_many_and_of_large_tensors(other: Backend, p: float) -> None:
    sizes = [[(7 * i) % 67 for i in range(700)], [8192 * 130 + 5], [8192 * 128, 33, 8192 * 129 - 1]]

    def norms(device: torch.device) -> list[Tensor]:
        found = []
        for index, dtype in itertools.product(range(3), (torch.float32, torch.bfloat16)):
            generator = torch.Generator().manual_seed(index)
            tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes[index]]
            found.append(sg.get_total_norm([t.to(device) for t in tensors], p))
        return found

    on_both(other, norms)


@others
def test_norms_of_complex_tensors(other: Backend) -> None:
    def norms(device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        kinds = itertools.product([torch.complex64, torch.complex128], [1, 65, 8193])
        tensors = [torch.randn(n, dtype=dtype, generator=generator) for dtype, n in kinds]
        return [sg.get_total_norm([t.to(device)]) for t in tensors]

    on_both(other, norms)


@others
@given(drawn=drawn_lists, total=st.sampled_from([0.0, 0.5, 3.0, 1e30, INF, math.nan]))
@settings(max_examples=60)
def test_clips_of_other_kinds(other: Backend, drawn: Drawn, total: float) -> None:
    def clip(device: torch.device) -> list[Tensor]:
        by_number, by_tensor, by_value = (tensors_of(drawn, device, True) for _ in range(3))
        sg.clip_grads_with_norm_(with_gradients(by_number), 1.0, total)
        norm = torch.tensor(total, dtype=torch.float64, device=device)
        sg.clip_grads_with_norm_(with_gradients(by_tensor), 1.0, norm)
        sg.clip_grad_value_(with_gradients(by_value), 0.7)
        return [*by_number, *by_tensor, *by_value]

    if drawn:
        on_both(other, clip)


@others
@given(
    drawn=drawn_lists,
    layouts=st.lists(st.integers(0, 4), min_size=7, max_size=7),
    l1=st.sampled_from([0.0, 0.1, 3.0]),
    l2=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=60)
def test_penalties(other: Backend, drawn: Drawn, layouts: list[int], l1: float, l2: float) -> None:
    def penalise(device: torch.device) -> list[Tensor]:
        params = [Parameter(t) for t in tensors_of(drawn, device, writable=True)]
        for param, layout in zip(params, layouts, strict=False):
            param.grad = like_layout(torch.ones_like(param.detach()), layout)
        value = sg.add_penalty_(params, l1, l2)
        grads = [p.grad for p in params if p.grad is not None]
        sg.soft_threshold_([p.detach() for p in params], l1)
        return [value, *grads, *(p.detach() for p in params)]

    on_both(other, penalise)


@others
def test_empty_tensors_of_every_layout(other: Backend) -> None:
    def step(device: torch.device) -> list[Tensor]:
        found = []
        for shape in [(0,), (2, 0, 3), (0, 3, 2, 2), (2, 0, 3, 3), (0, 0, 0, 2)]:
            for layout in range(5):
                empty = like_layout(torch.zeros(shape, device=device), layout)
                params = [Parameter(empty), Parameter(torch.ones(3, device=device))]
                for param in params:
                    param.grad = torch.ones_like(param)
                found.append(sg.clip_grad_norm_(params, 1.0))
                found.append(sg.add_penalty_(params, 0.1, 0.1))
                sg.optim.AdamW(params, max_norm=1.0, l2=0.1).step()
                found.append(params[1].detach())
        return found

    on_both(other, step)


STEPS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05},
    "SGD-dampened": {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "SGD-nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True},
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "Adam-amsgrad": {"lr": 0.01, "amsgrad": True, "maximize": True},
    "AdamW": {"lr": 0.01, "betas": (0.6, 0.9)},
    "AdamW-amsgrad": {"lr": 0.01, "amsgrad": True},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True},
    "Adagrad-start": {"lr": 0.05, "initial_accumulator_value": 0.3},
    "RMSprop": {"lr": 0.01, "weight_decay": 0.01},
    "RMSprop-centered": {"lr": 0.01, "centered": True, "eps": 1e-3},
    "RMSprop-momentum": {"lr": 0.01, "momentum": 0.5, "maximize": True},
    "RMSprop-both": {"lr": 0.01, "momentum": 0.5, "centered": True, "eps": 1e-3},
}
OURS: dict[str, dict[str, Any]] = {
    "l1-l2": {"l1": 0.1, "l2": 0.2},
    "after-clip": {"l1": 0.1, "l2": 0.2, "penalty_order": "after_clip", "clip_value": 0.05},
    "proximal": {"l1": 0.3, "l1_mode": "proximal"},
    "by-group": {"clip_scope": "group", "clip_value": 0.1},
    "by-tensor": {"clip_scope": "tensor", "norm_type": 1.0},
    "largest": {"norm_type": INF},
    "cubic-by-tensor": {"norm_type": 3.0, "clip_scope": "tensor"},
    "root-by-group": {"norm_type": 0.5, "clip_scope": "group", "nonfinite": "zero"},
    "to-nothing": {"max_norm": 0.0, "clip_value": 0.0, "l2": 0.1, "penalty_order": "after_clip"},
    "no-limit": {"max_norm": None},
    "zero": {"nonfinite": "zero"},
    "propagate": {"nonfinite": "propagate"},
    "write": {"write_grads": True},
    "write-all": {"write_grads": True, "l1": 0.1, "l2": 0.2, "clip_value": 0.1},
}


def steps_of(
    backend: Backend, rule: str, dtype: torch.dtype, scale: float = 1.0, **ours: Any
) -> Any:
    """Take five steps, one with a NaN; return parameters, state, norms, gradients and counters."""
    with backend.active():
        params = mixed_parameters(dtype, backend.device)
        large = torch.linspace(-2, 2, 8197, dtype=torch.float64).to(dtype)
        params.append(Parameter(large.to(backend.device)))
        groups = [{"params": params[:6]}, {"params": params[6:], "lr": 0.02}]
        torchs = getattr(torch.optim, rule.split("-")[0])(groups, **STEPS[rule])
        optimizer = sg.Stabilizer(torchs, **{"max_norm": 1.0, **ours})
        norms = []
        decades = 3.0 if dtype == torch.float16 else 6.0
        for step, gradients in enumerate(gradient_sequence(params, 5, decades=decades)):
            assign_copies(params, gradients)
            last = params[-1].grad
            if step == 3 and last is not None:
                last[77] = math.nan
            if scale != 1.0:
                optimizer.grad_scale = torch.tensor(scale, device=backend.device)
            optimizer.step()
            assert optimizer.path == "fused"
            norms.append(optimizer.grad_norm)
        grads = [None if p.grad is None else bits(p.grad) for p in params]
        counters = (optimizer.skipped_steps, optimizer.clipped_steps)
        found = [bits(p) for p in params], tensor_state(optimizer), norms, grads, counters
        return as_bits(found)


@pytest.mark.once
def test_a_nan_has_the_same_bits_wherever_it_was_made() -> None:
    of_a_cpu = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)
    of_a_gpu = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert same_bits(of_a_cpu, of_a_gpu)
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def as_bits(found: Any) -> Any:
    """Replace tensors by their bits, so that a NaN compares like any other number."""
    if isinstance(found, Tensor):
        return bits(found)
    if isinstance(found, dict):
        return {key: as_bits(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [as_bits(value) for value in found]
    return found


@on_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", STEPS)
def test_steps_of_every_rule(other: Backend, rule: str, dtype: torch.dtype) -> None:
    assert_same_tree(steps_of(other, rule, dtype), steps_of(CPU, rule, dtype))


@on_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["AdamW", "SGD-dampened"])
@pytest.mark.parametrize("ours", OURS)
def test_steps_with_every_option(other: Backend, ours: str, rule: str, dtype: torch.dtype) -> None:
    got = steps_of(other, rule, dtype, scale=3.0, **OURS[ours])
    assert_same_tree(got, steps_of(CPU, rule, dtype, scale=3.0, **OURS[ours]))


@on_host
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize("rule", ["AdamW", "SGD-dampened", "NAdam"])
def test_steps_of_parameters_of_all_dtypes_at_once(other: Backend, rule: str, scale: float) -> None:
    def run(device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(131 * (i + 1), generator=generator) for i in range(12)]
        params = [Parameter(d.to(DTYPES[i % 4]).to(device)) for i, d in enumerate(drawn)]
        name = rule.split("-")[0]
        groups = [{"params": params[:7]}, {"params": params[7:], "max_norm": 0.1}]
        torchs = unfused.optimizer_class(name)(groups, **STEPS.get(rule, {"eps": 1e-3}))
        optimizer = sg.Stabilizer(torchs, max_norm=1.0, l2=0.01)
        found: list[Tensor] = []
        for step in range(4):
            for i, param in enumerate(params):
                values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                values *= scale if param.dtype == torch.float64 else 10.0 ** (step - 2)
                param.grad = values.to(device, param.dtype)
                # A gradient may have another dtype than its parameter, as autocast and .data leave it.
                if i in (2, 4, 8) and rule != "NAdam":
                    param.grad.data = values.to(device, DTYPES[(i + step) % 4])
            optimizer.step()
            assert optimizer.skipped_steps == 0
            found.append(optimizer.grad_norm)
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*found, *(p.detach() for p in params), *(v for v in states if v is not None)]

    on_both(other, run)


# Where gradients, parameters and state begin, in elements from a multiple of 16 bytes: as buckets leave them.
OFFSETS = [(1, 0, 0), (3, 0, 0), (4, 0, 0), (1, 1, 0), (0, 5, 0), (0, 0, 7)]


@on_host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["AdamW-amsgrad", "SGD-nesterov", "RMSprop-both"])
def test_steps_of_tensors_that_begin_anywhere(
    other: Backend, rule: str, dtype: torch.dtype
) -> None:
    def run(device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def drawn(size: int, offset: int) -> Tensor:
            flat = torch.randn(size + offset, generator=generator, dtype=torch.float64)
            return flat.to(dtype).to(device)[offset:]

        # Beside them an aligned one, which must not notice.
        sizes = [8192 + 13, 517, 8, 3, 1030, 2051, 1600]
        params = [
            Parameter(drawn(size, param))
            for size, (_, param, _) in zip(sizes, [*OFFSETS, (0, 0, 0)], strict=True)
        ]
        torchs = getattr(torch.optim, rule.split("-")[0])(params, **STEPS[rule])
        optimizer = sg.Stabilizer(torchs, max_norm=1.0)
        found: list[Tensor] = []
        for step in range(3):
            for param, (grad, _, state) in zip(params, [*OFFSETS, (0, 0, 0)], strict=True):
                param.grad = drawn(param.numel(), grad)
                for name, value in optimizer.state[param].items():
                    if step == 1 and state and value is not None and value.dim() == 1:
                        moved = torch.cat([value[:state], value])[state:]
                        optimizer.state[param][name] = moved
            optimizer.step()
            assert optimizer.path == "fused"
            found.append(optimizer.grad_norm)
            found.extend(sg.clip_grad_norm_([param], 0.5) for param in params)
            found.extend(param.grad.clone() for param in params if param.grad is not None)
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*found, *(p.detach() for p in params), *(v for v in states if v is not None)]

    on_both(other, run)


# Rules that divide by a root of their state; the first step of each is from zero state.
DIVIDING = [
    "Adam",
    "AdamW-amsgrad",
    "Adagrad",
    "RMSprop",
    "RMSprop-both",
    "NAdam",
    "RAdam",
    "Adamax",
]


@on_host
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", DIVIDING)
def test_steps_of_rows_that_no_gradient_reaches(
    other: Backend, rule: str, dtype: torch.dtype, eps: float
) -> None:
    def run(device: torch.device) -> list[Tensor]:
        values = torch.linspace(-2, 2, 600, dtype=torch.float64).view(20, 30)
        param = Parameter(values.to(dtype).to(device))
        name = rule.split("-")[0]
        options = {**STEPS.get(rule, {}), "eps": eps, "weight_decay": 0.0}
        optimizer = sg.Stabilizer(getattr(torch.optim, name)([param], **options), max_norm=1.0)
        for step in range(3):
            param.grad = torch.zeros_like(param)
            param.grad[5:8] = param[5:8].detach() + step
            param.grad[9] = -0.0
            param.grad[11, :4] = torch.finfo(dtype).tiny
            optimizer.step()
            assert optimizer.path == "fused"
        states = [value for value in optimizer.state[param].values() if value is not None]
        return [param.detach(), *states]

    want = [value.cpu() for value in on(CPU, lambda: run(CPU.device))]
    got = [value.cpu() for value in on(other, lambda: run(other.device))]
    assert_same_tree(as_bits(got), as_bits(want))
    # Where nothing but eps is left of the denominator, nothing moves.
    start = torch.linspace(-2, 2, 600, dtype=torch.float64).view(20, 30).to(dtype)
    idle = [row for row in range(20) if row not in (5, 6, 7, 11)]
    assert eps == 0 or torch.equal(want[0][idle], start[idle])


def results() -> str:
    """Return what the emulated kernels compute in this process, as text."""
    words: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in (1, 130, 8192, 30011)]
    with EMULATED.active():
        for p in (2.0, 1.0, INF, 3.0):
            words.append(bits(sg.get_total_norm(tensors, p)).tolist())
        params = [Parameter(t) for t in tensors]
        for param in params:
            param.grad = torch.full_like(param, 0.5)
        words.append(bits(sg.add_penalty_(params, 0.1, 0.2)).tolist())
        sg.clip_grad_norm_(params, 1.0)
        words.append([bits(p.grad).sum().item() for p in params if p.grad is not None])
    for rule, dtype in (("AdamW-amsgrad", torch.float32), ("RMSprop-both", torch.bfloat16)):
        params_, state, norms, _, counters = steps_of(EMULATED, rule, dtype, l2=0.1)
        words += [[p.tolist() for p in params_], [n.tolist() for n in norms], counters]
        words += [{str(k): v.tolist() for k, v in entry.items()} for entry in state.values()]
    return json.dumps(words)


@pytest.mark.emulated
@pytest.mark.skipif(bool(EMULATED.why_not()), reason=str(EMULATED.why_not()))
def test_results_do_not_depend_on_the_order_of_threads() -> None:
    orders = [
        {"ORDER": "random", "SEED": "4711"},
        {"ORDER": "reverse", "THREADS": "1"},
    ]
    code = "from tests.optim.test_same_bits import results; print(results())"
    running = []
    for order in orders:
        environment = {f"STEADYGRAD_EMULATION_{key}": value for key, value in order.items()}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    here = results()
    assert len(here) > 10_000
    for process in running:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        assert output.strip() == here
