"""Checks what the fused step keeps from step to step, and that it notices when something was exchanged."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend

SIZES = (1, 33, 1024, 8193, 40)


def make(backend: Backend, count: int = 1) -> tuple[list[Parameter], sg.Stabilizer]:
    generator = torch.Generator().manual_seed(5)
    params = [
        Parameter(torch.randn(size, generator=generator).to(backend.device))
        for size in SIZES * count
    ]
    return params, sg.Stabilizer(torch.optim.AdamW(params, lr=0.05), max_norm=1.0)


def step(params: list[Parameter], optimizer: sg.Stabilizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device)
    optimizer.step()
    assert optimizer.path == "fused"


def states(optimizer: sg.Stabilizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def swap_all_data(params: list[Parameter], optimizer: sg.Stabilizer) -> None:
    for value in states(optimizer):
        value.data = value.data.clone()


def rebind_one(params: list[Parameter], optimizer: sg.Stabilizer) -> None:
    state = optimizer.state[params[2]]
    state["exp_avg"] = state["exp_avg"].clone()


def replace_one_entry(params: list[Parameter], optimizer: sg.Stabilizer) -> None:
    state = optimizer.state[params[1]]
    optimizer.state[params[1]] = {key: value.clone() for key, value in state.items()}


def move_parameters_and_states(params: list[Parameter], optimizer: sg.Stabilizer) -> None:
    for tensor in [*params, *states(optimizer)]:
        tensor.data = tensor.data.clone()


def reorder_entries(params: list[Parameter], optimizer: sg.Stabilizer) -> None:
    entry = optimizer.state.pop(params[0])
    optimizer.state[params[0]] = entry


@pytest.mark.parametrize(
    "exchange",
    [
        swap_all_data,
        rebind_one,
        replace_one_entry,
        move_parameters_and_states,
        reorder_entries,
    ],
)
def test_exchanged_memory_is_noticed_at_once(
    backend: Backend, exchange: Callable[[list[Parameter], sg.Stabilizer], None]
) -> None:
    params, optimizer = make(backend, count=4)
    same_params, same = make(backend, count=4)
    for seed in range(3):
        step(params, optimizer, seed)
        step(same_params, same, seed)
    exchange(params, optimizer)
    for seed in range(3, 6):
        step(params, optimizer, seed)
        step(same_params, same, seed)
    for one, other in zip(params, same_params, strict=True):
        assert torch.equal(one, other)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, same.state[other][key])


def swap_one_data(optimizer: sg.Stabilizer, param: Parameter) -> None:
    moment = optimizer.state[param]["exp_avg"]
    moment.data = moment.data.clone()


def share_memory(optimizer: sg.Stabilizer, param: Parameter) -> None:
    optimizer.state[param]["exp_avg"].share_memory_()


def grow_storage(optimizer: sg.Stabilizer, param: Parameter) -> None:
    storage = optimizer.state[param]["exp_avg"].untyped_storage()
    storage.resize_(storage.nbytes() + 4096)


@pytest.mark.parametrize("move", [swap_one_data, share_memory, grow_storage])
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_memory_of_a_single_state_that_moved_is_followed(
    move: Callable[[sg.Stabilizer, Parameter], None], index: int
) -> None:
    backend = Backend("cpu", torch.device("cpu"))
    params, optimizer = make(backend)
    same_params, same = make(backend)
    for seed in range(4):
        if seed == 2:
            move(optimizer, params[index])
        step(params, optimizer, seed)
        step(same_params, same, seed)
    for one, other in zip(params, same_params, strict=True):
        assert torch.equal(one, other)
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, same.state[other][key])


@pytest.mark.parametrize("index", range(len(SIZES)))
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_freed_memory_of_a_state_is_refused(backend: Backend, index: int, key: str) -> None:
    params, optimizer = make(backend)
    step(params, optimizer, 0)
    before = [param.detach().clone() for param in params]
    optimizer.state[params[index]][key].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage was freed"):
        step(params, optimizer, 1)
    assert all(torch.equal(one, other) for one, other in zip(params, before, strict=True))


# These sizes are around the kernels' tiles of 1024 and chunks of 8192 elements.
@pytest.mark.parametrize("size", [1023, 1024, 1025, 8191, 8192, 8193, 16384, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nonfinite_elements_in_large_tensors(
    backend: Backend, size: int, dtype: torch.dtype
) -> None:
    gradient = torch.full((size,), 2.0, dtype=dtype, device=backend.device)
    gradient[[0, size // 2, size - 1]] = torch.tensor(
        [float("nan"), float("inf"), -float("inf")], dtype=dtype, device=backend.device
    )
    param = Parameter(torch.ones(size, dtype=dtype, device=backend.device))
    param.grad = gradient.clone()
    optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=1.0), max_norm=1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and bool((param == 1).all())

    zeroing = sg.Stabilizer(torch.optim.SGD([param], lr=1.0), nonfinite="zero")
    zeroing.step()
    assert zeroing.grad_norm is not None
    assert float(zeroing.grad_norm) == pytest.approx(2.0 * (size - 3) ** 0.5, rel=1e-6)
    expected = torch.where(torch.isfinite(gradient), -1.0, 1.0).to(dtype)
    assert torch.equal(param.detach(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_infinite_limit_leaves_nonfinite_gradients_alone(backend: Backend, value: float) -> None:
    gradient = torch.tensor([1.0, value, -2.0], device=backend.device)
    param = Parameter(torch.zeros(3, device=backend.device))
    param.grad = gradient.clone()
    norm = sg.clip_grad_norm_([param], float("inf"))
    assert not torch.isfinite(norm)
    torch.testing.assert_close(param.grad, gradient, rtol=0, atol=0, equal_nan=True)


# Threads share 2^17 elements or more.
PROGRAM = """
import hashlib, sys, torch, steadygrad as sg
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
digest = hashlib.sha256()
def digest_of(tensor):
    digest.update(tensor.detach().double().numpy().tobytes())
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for rule in ("SGD", "AdamW", "Adagrad", "RMSprop"):
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (1, 31, 1025, 9001)]
        optimizer = sg.Stabilizer(getattr(torch.optim, rule)(params, lr=1e-2), max_norm=1.0, l1=1e-3)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            for norm_type in (1.0, 2.0, float("inf")):
                digest_of(sg.get_total_norm([p.grad for p in params], norm_type))
            optimizer.step()
        for p in params:
            digest_of(p)
for dtype in (torch.bfloat16, torch.float16):
    for how in ("stochastic", "kahan", "master"):
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (1, 31, 1025, 140_001)]
        optimizer = sg.optim.AdamW(params, lr=1e-2, max_norm=1.0, rounding=how, state_dtype=torch.float32)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        for p in params:
            for tensor in (p, *optimizer.state[p].values()):
                digest_of(tensor)
print(sg._kernels.build_info()["instruction_set"], digest.hexdigest())
"""


@pytest.mark.slow
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits() -> None:
    known = ["baseline", "avx2", "avx512"]
    widest = str(sg._kernels.build_info()["instruction_set"])
    digests = set()
    for threads, name in enumerate(known[: known.index(widest) + 1], start=1):
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(threads)],
            env={**os.environ, "STEADYGRAD_INSTRUCTION_SET": name},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert out[0] == name
        digests.add(out[1])
    assert len(digests) == 1 and len(digests.pop()) == hashlib.sha256().digest_size * 2


@pytest.mark.full
def test_an_unknown_instruction_set_is_told() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import steadygrad"],
        env={**os.environ, "STEADYGRAD_INSTRUCTION_SET": "mmx"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "STEADYGRAD_INSTRUCTION_SET" in run.stderr and "mmx" in run.stderr
