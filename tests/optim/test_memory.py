"""A step and a clip allocate nothing of the size of a gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steadygrad as sg
from tests.backends import Backend

RULES = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"]
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "RMSprop": {"centered": True, "momentum": 0.9},
}
ELEMENTS = 100_000


class LargestResult(TorchDispatchMode):
    """Records the largest new storage that an operator of torch made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def largest_allocation(call: Callable[[], object]) -> int:
    """Return the size in bytes of the largest tensor made, as torch's dispatcher and allocator see it."""
    with LargestResult() as dispatched:
        call()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    allocated = [
        event.cpu_memory_usage if hasattr(event, "cpu_memory_usage") else 0
        for event in profile.events()
    ]
    return max(dispatched.nbytes, *allocated, 0)


def large_params(backend: Backend) -> list[Parameter]:
    params = [
        Parameter(torch.randn(ELEMENTS, device=backend.device)),
        Parameter(torch.randn(100, 1000, device=backend.device).t()),
        Parameter(torch.randn(10, 100, 10, 10, device=backend.device)),
    ]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def test_the_measurement_sees_what_torch_allocates(backend: Backend) -> None:
    params = large_params(backend)
    assert largest_allocation(lambda: torch.add(params[0], 1.0)) >= 4 * ELEMENTS


@pytest.mark.parametrize("max_norm", [1.0, 1e9], ids=["active", "inactive"])
def test_functions_allocate_nothing_of_gradient_size(backend: Backend, max_norm: float) -> None:
    params = large_params(backend)
    for call in (
        lambda: sg.clip_grad_norm_(params, max_norm),
        lambda: sg.get_total_norm([p.grad for p in params if p.grad is not None]),
        lambda: sg.clip_grads_with_norm_(params, max_norm, torch.tensor(10.0)),
        lambda: sg.clip_grad_value_(params, max_norm),
        lambda: sg.add_penalty_(params, 1e-6, 1e-6),
        lambda: sg.soft_threshold_(params, 1e-6),
    ):
        assert largest_allocation(call) < 4096


@pytest.mark.parametrize("l1_mode", ["subgradient", "proximal"])
@pytest.mark.parametrize("rule", RULES)
def test_a_fused_step_allocates_nothing_of_gradient_size(
    backend: Backend, rule: str, l1_mode: str
) -> None:
    params = large_params(backend)
    inner = getattr(torch.optim, rule)(params, lr=1e-3, **OPTIONS.get(rule, {}))
    optimizer = sg.Stabilizer(
        inner, max_norm=1.0, clip_value=0.5, l1=1e-4, l2=1e-4, l1_mode=l1_mode
    )
    optimizer.step()  # makes the state
    assert largest_allocation(optimizer.step) < 4096
    assert optimizer.path == "fused"


def test_the_in_place_path_adds_nothing_of_gradient_size(backend: Backend) -> None:
    class Nothing(torch.optim.Optimizer):
        def __init__(self, params: list[Parameter]) -> None:
            super().__init__(params, {"lr": 0.1})

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return None if closure is None else closure()

    params = large_params(backend)
    optimizer = sg.Stabilizer(Nothing(params), max_norm=1.0, l1=1e-4, l2=1e-4)
    optimizer.step()
    assert largest_allocation(optimizer.step) < 4096


# This runs in a process of its own, whose peak nothing else has raised. It would also see memory that the extension
# allocates itself; torch's own optimizer shows that the measurement works.
PEAK = """
import json, re, torch, steadygrad as sg
from torch.nn import Parameter
torch.set_num_threads(2)
elements = 16_000_000
def peak():
    # Not ru_maxrss: a process inherits that from the one that started it.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
params = [Parameter(torch.ones(elements // 4)) for _ in range(4)]
for param in params:
    param.grad = torch.full_like(param, 0.5)
optimizer = sg.Stabilizer(torch.optim.AdamW(params, lr=1e-3), max_norm=1.0, l1=1e-6)
optimizer.step()
before = peak()
for _ in range(3):
    optimizer.step()
    sg.clip_grad_norm_(params, 0.5)
    sg.add_penalty_(params, 1e-6, 1e-6)
ours = peak() - before
assert optimizer.path == "fused"
before = peak()
torch.nn.utils.clip_grad_norm_(params, 1.0)
optimizer.optimizer.step()
print(json.dumps({"ours": ours, "torch": peak() - before, "gradient": elements}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.slow
def test_the_peak_of_the_process_does_not_rise(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip(f"the resident set says nothing about the memory of {backend.name}")
    ran = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=300
    )
    rise = json.loads(ran.stdout)
    # The limit is a quarter of one of the four gradients of 4 MB; torch's default step takes at least one.
    assert rise["ours"] < rise["gradient"] // 4
    assert rise["torch"] > rise["gradient"] // 2
