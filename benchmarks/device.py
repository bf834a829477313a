"""The devices that a benchmark runs on: what is measured there, against which memory, how timed."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence

import torch

from benchmarks import environment
from benchmarks.case import Case
from benchmarks.cases import CASES, CUDA_CASES
from benchmarks.device_timer import CudaEvents, DeviceRace, Events
from benchmarks.environment import Environment
from benchmarks.measure import (
    CUDA_FULL,
    CUDA_QUICK,
    FULL,
    QUICK,
    CopyYardstick,
    Effort,
    GpuYardstick,
    Ground,
)
from benchmarks.timer import Candidate, Race, once_over

# A buffer comes back after this many times the cache was written elsewhere: nothing of it is left.
_CACHES_BETWEEN = 4


def _sets_beyond_cache(case: Case, cache_bytes: int) -> int:
    """Enough sets of buffers that none is found in cache."""
    return max(1, math.ceil(_CACHES_BETWEEN * cache_bytes / case.working_set_bytes))


class DeviceUnusable(RuntimeError):
    """A device was asked for that torch or steadygrad cannot use; the message says why."""


class HostDevice:
    """The CPU."""

    rehearsal = False

    def __init__(self) -> None:
        self.environment: Environment = environment.this_machine()
        self.ground = Ground(sets=self._sets, over=once_over)

    def _sets(self, case: Case) -> int:
        """One for what works in place: the yardstick flushes the caches between its calls."""
        return _sets_beyond_cache(case, self.environment.cache_bytes) if case.allocates else 1

    def cases(self) -> Sequence[Case]:
        """All cases, in table order."""
        return CASES

    def effort(self, quick: bool) -> Effort:
        """How long a case is measured."""
        return QUICK if quick else FULL

    def free_bytes(self) -> int:
        """Memory free for buffers."""
        return environment.available_memory_bytes()

    def yardstick(self) -> CopyYardstick:
        """Buffers to measure the copy bandwidth with."""
        return CopyYardstick(self.environment.cache_bytes)

    def release(self) -> None:
        """Give back memory that the last case left."""


class CudaDevice(HostDevice):
    """The current CUDA device, timed by its events."""

    def __init__(self) -> None:
        """Look at the device.

        Raises:
            DeviceUnusable: torch or steadygrad cannot use one; says which, and why.
        """
        if problem := cuda_problem():
            raise DeviceUnusable(f"benchmarks: --device cuda: {problem}")
        self._prepare(
            environment.this_machine(environment.this_gpu()), torch.device("cuda"), CudaEvents()
        )

    def _prepare(self, described: Environment, place: torch.device, events: Events) -> None:
        self.environment = described

        def race(candidates: Sequence[Candidate]) -> Race:
            return DeviceRace(candidates, events)

        self.ground = Ground(place, race, self._sets)

    def _sets(self, case: Case) -> int:
        """Enough sets of buffers that none is found in cache; the small ones stay there anyway."""
        if case.host_cost:
            return 1
        return _sets_beyond_cache(case, self.environment.cache_bytes)

    def cases(self) -> Sequence[Case]:
        """All cases, in table order."""
        return CUDA_CASES

    def effort(self, quick: bool) -> Effort:
        """How long a case is measured."""
        return CUDA_QUICK if quick else CUDA_FULL

    def free_bytes(self) -> int:
        """Memory free on the device."""
        return int(torch.cuda.mem_get_info()[0])

    def yardstick(self) -> CopyYardstick:
        """Buffers to measure the copy bandwidth with."""
        return GpuYardstick(self.ground.device)

    def release(self) -> None:
        """Give back memory that the last case left."""
        gc.collect()
        torch.cuda.empty_cache()


def cuda_problem() -> str:
    """Why no CUDA device can be measured; "" if one can."""
    info = environment.cuda_info()
    if not info:
        return "steadygrad was built without CUDA"
    if info["problem"]:
        return str(info["problem"])
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; is it a build for the CPU?"
    if not info["devices"][torch.cuda.current_device()]["usable"]:
        return f"the kernels were compiled for {info['architectures']}, not for this device"
    return ""


def device_named(name: str) -> HostDevice:
    """The device called "cpu" or "cuda".

    Raises:
        DeviceUnusable: there is no usable CUDA device; says why.
        ValueError: the name is another.
    """
    if name == "cpu":
        return HostDevice()
    if name == "cuda":
        return CudaDevice()
    raise ValueError(f"benchmarks: device must be 'cpu' or 'cuda', got {name!r}")
