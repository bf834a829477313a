"""Rehearse the GPU benchmark without a GPU: tiny tensors, emulated kernels, the host's clock.

A rehearsal shows that every kind of case runs and that the result file can be written. It says
nothing about speed.
"""

from __future__ import annotations

import time
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import environment
from benchmarks.cases import CUDA_CASES
from benchmarks.measure import CopyYardstick, GpuYardstick, HostDevice
from benchmarks.timer import DeviceRace
from steadygrad import _kernels

# Keeps the modules that the emulated kernels have replaced. pybind11 forgets the conversions that both
# modules share when a class of one of them is freed.
_REPLACED: list[object] = []


# Time stamps of the host in the place of a device's.
_HOST_EVENTS: Any = SimpleNamespace(
    mark=time.perf_counter,
    seconds_between=lambda start, end: end - start,
    synchronize=lambda: None,
    keep_busy=lambda seconds: None,
)


class EmulatedDevice(HostDevice):
    """Represents a GPU whose kernels run on the CPU; every case is cut down to a few elements."""

    rehearsal = True
    efforts = (0.0, 1, 1), (0.0, 1, 1)
    race = partial(DeviceRace, events=_HOST_EVENTS)

    def __init__(self) -> None:
        emulate()
        gpu: dict[str, Any] = dict.fromkeys(
            ("architecture", "driver", "torch_cuda", "kernels_runtime", "nvcc"), "none"
        )
        gpu |= {"name": "emulated", "multiprocessors": 0, "memory_bytes": 0, "l2_bytes": 2**13}
        self.environment = environment.this_machine(gpu)
        self.plan = list({case.key: case for case in (e.cut() for e in CUDA_CASES)}.values())

    def yardstick(self) -> CopyYardstick:
        return GpuYardstick(torch.device("cpu"), elements=2**14)


def emulate() -> None:
    """Replace the compiled kernels with the emulated ones in this process."""
    emulated = import_module("steadygrad_emulated")
    for name in dir(_kernels):
        if not name.startswith("__"):
            _REPLACED.append(getattr(_kernels, name))
            setattr(_kernels, name, getattr(emulated, name))
