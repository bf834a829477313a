"""The benchmark for a GPU on a machine without one: tiny tensors, emulated kernels, host clocks.

It shows that every kind of case runs and that the result file can be written, and nothing about speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from benchmarks import environment
from benchmarks.case import Case
from benchmarks.cases import CUDA_CASES
from benchmarks.measure import CopyYardstick, CudaDevice, Effort, GpuYardstick
from steadygrad import _kernels

# What the emulated kernels have taken the place of. pybind11 forgets conversions that both modules share where a class
# of one of them is freed.
_REPLACED: list[object] = []


class HostEvents:
    """Time stamps of the host in the place of a device's."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds_between(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        pass

    def keep_busy(self, seconds: float) -> None:
        pass


class EmulatedDevice(CudaDevice):
    """A CUDA device whose kernels run on the CPU; every case is cut down to a few elements."""

    rehearsal = True
    place = torch.device("cpu")

    def __init__(self) -> None:
        emulate()
        none = dict.fromkeys(("architecture", "driver", "torch_cuda", "kernels_runtime"), "none")
        gpu = {"name": "emulated", "multiprocessors": 0, "memory_bytes": 0, "l2_bytes": 2**13}
        gpu |= {**none, "nvcc": environment.nvcc_version()}
        self._prepare(environment.this_machine(gpu), HostEvents())

    def cases(self) -> Sequence[Case]:
        return list({case.key: case for case in (each.cut() for each in CUDA_CASES)}.values())

    def effort(self, quick: bool) -> Effort:
        return 0.0, 1, 1

    def free_bytes(self) -> int:
        return environment.available_memory_bytes()

    def yardstick(self) -> CopyYardstick:
        return GpuYardstick(self.place, elements=2**14)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        call()
        return None

    def release(self) -> None:
        pass


def emulate() -> None:
    """Put the emulated kernels in the place of the compiled ones, for this process."""
    emulated = import_module("steadygrad_emulated")
    for name in dir(_kernels):
        if not name.startswith("__"):
            _REPLACED.append(getattr(_kernels, name))
            setattr(_kernels, name, getattr(emulated, name))
