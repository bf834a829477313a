"""Run cases: race the candidates beside a copy of memory, and derive the numbers of a result file."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import environment
from benchmarks.case import Case
from benchmarks.cases import CASES, CUDA_CASES
from benchmarks.results import SCHEMA, Result, judge, summaries
from benchmarks.timer import Candidate, CudaEvents, DeviceRace, Race, Timing, once_over
from study.record import now

# The smallest size of the yardstick's buffers in bytes, for machines with small caches.
_SMALLEST_BUFFER = 256 * 2**20
# Between two uses of a buffer this many times the cache size is written elsewhere, so that nothing of
# the buffer is left in the cache.
_CACHES_BETWEEN = 4
# Seconds of a race, and its smallest and largest number of rounds.
Effort = tuple[float, int, int]
# The reason why a case was skipped begins with this word if the case raised an error.
FAILED = "failed"


class DeviceUnusable(RuntimeError):
    """Raised for a device that torch or steadygrad cannot use; the message says why."""


class CopyYardstick:
    """Measures copy bandwidth by two plain copies that join every race of a memory-bound case.

    The copies run in the same rounds as the candidates, so that a machine that slows down for a
    minute slows the yardstick too. They also flush the caches once per round, so that each candidate
    finds its buffers cold. The larger bandwidth of the two counts: a CPU's copy reads the
    destination's cache lines before it overwrites them unless it uses streaming stores, so it may
    move 12 bytes where 8 are counted, but scaling in place really moves 8.
    """

    candidates: tuple[Candidate, ...]

    def __init__(self, cache_bytes: int) -> None:
        """Reserve two buffers of at least 256 MiB, and at least four times the last-level cache."""
        elements = max(_SMALLEST_BUFFER // 4, cache_bytes)
        source, target = torch.ones(elements), torch.ones(elements)
        self._evicting = source[:cache_bytes]
        self.buffer_bytes = 4 * elements
        self.candidates = (
            Candidate("copy_", lambda: target.copy_(source)),
            Candidate("mul_", lambda: target.mul_(1.0)),
        )

    def joins(self, case: Case) -> bool:
        """Return whether it joins the race of `case`, which it does unless the host's work is the bound."""
        return not case.host_cost

    def flush(self) -> None:
        """Read four times the cache size, so that no candidate finds in cache what another has freed."""
        self._evicting.sum()

    def bandwidth(self, timings: Sequence[Timing]) -> Result:
        """Return the bandwidths from laps in the order of `candidates`; a GPU has no `mul_`."""
        speeds = [2 * self.buffer_bytes / 1e9 / timing.median("device") for timing in timings]
        return {
            "copy_gigabytes_per_second": speeds[0],
            "mul_gigabytes_per_second": speeds[1] if len(speeds) > 1 else None,
            "yardstick_gigabytes_per_second": max(speeds),
        }


class GpuYardstick(CopyYardstick):
    """Measures torch's copy of 2^28 fp32 elements on the GPU in every race, so every case has a share."""

    def __init__(self, device: torch.device, elements: int = 2**28) -> None:
        source, target = torch.randn(elements, device=device), torch.ones(elements, device=device)
        self.buffer_bytes = 4 * elements
        self.candidates = (Candidate("copy_", lambda: target.copy_(source)),)

    def joins(self, case: Case) -> bool:
        return True

    def flush(self) -> None:
        """Do nothing, since a lap on a GPU is many calls that take turns over sets of buffers."""


class HostDevice:
    """Represents the CPU: its cases, its copy bandwidth and its clock."""

    rehearsal = False
    place = torch.device("cpu")
    plan: Sequence[Case] = CASES  # on a GPU the most important cases come first
    efforts: tuple[Effort, Effort] = (6.0, 9, 1000), (1.5, 5, 200)  # of full and of quick runs
    race: Callable[[Sequence[Candidate]], Race] = staticmethod(Race)

    def __init__(self) -> None:
        self.environment = environment.this_machine()

    def sets(self, case: Case) -> int:
        """Return how many sets of buffers keep the caches cold.

        Between calls that work in place the yardstick flushes the caches instead.
        """
        return self.beyond_cache(case) if case.allocates else 1

    def beyond_cache(self, case: Case) -> int:
        """Return how many sets of a case's buffers are too large for any cache together."""
        cache = self.environment["cache_bytes"]
        return max(1, math.ceil(_CACHES_BETWEEN * int(cache) / case.working_set_bytes))

    def free_bytes(self) -> int:
        """Return the bytes of memory that are free for buffers."""
        return environment.available_memory_bytes()

    def yardstick(self) -> CopyYardstick:
        """Return the yardstick that measures the copy bandwidth, with its buffers reserved."""
        return CopyYardstick(self.environment["cache_bytes"])


class CudaDevice(HostDevice):
    """Represents the current CUDA device, which is timed by its events.

    Raises:
        DeviceUnusable: Torch or steadygrad cannot use a CUDA device; the message says which, and why.
    """

    place = torch.device("cuda")
    plan = CUDA_CASES
    # A GPU is steadier than a shared host and a lap is many calls, so races are shorter.
    efforts = (0.6, 7, 75), (0.5, 5, 50)

    def __init__(self) -> None:
        if problem := environment.cuda_problem():
            raise DeviceUnusable(f"benchmarks: --device cuda: {problem}")
        self.environment = environment.this_machine(environment.this_gpu())
        self.race = partial(DeviceRace, events=CudaEvents())

    def sets(self, case: Case) -> int:
        # Cases of host cost are meant to fit in cache.
        return 1 if case.host_cost else self.beyond_cache(case)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def yardstick(self) -> CopyYardstick:
        return GpuYardstick(self.place)


def contest(case: Case, yardstick: CopyYardstick, device: HostDevice) -> tuple[Race, list[str]]:
    """Build the candidates of a case, each with its own buffers, and call each once.

    Returns:
        The race of ours, of the peers that this version of torch has, and of the yardstick; and the
        reasons why other peers are missing.
    """
    candidates: list[Candidate] = []
    missing: list[str] = []
    for build in case.builds:
        try:
            sets = [build(device.place) for _ in range(device.sets(case))]
            for candidate in sets:
                candidate.once()
        except (NotImplementedError, RuntimeError) as error:
            if not candidates:  # ours
                raise
            reason = str(error).partition("\n")[0]
            missing.append(f"{type(error).__name__}: {reason}")
            continue
        over_all = once_over(sets)
        if case.allocates:
            over_all = replace(over_all, prepare=yardstick.flush)
        candidates.append(over_all)
    if yardstick.joins(case):
        candidates += yardstick.candidates
    return device.race(candidates), missing


def case_result(case: Case, timings: Sequence[Timing], yardstick: CopyYardstick) -> Result:
    """Derive the numbers of a case from the laps of its race; those of the yardstick come last.

    GB/s are the floor's bytes divided by our median time, which on a GPU is GPU time. Passes that
    find data in cache can lift them above the copy bandwidth.
    """
    count = len(timings) - (len(yardstick.candidates) if yardstick.joins(case) else 0)
    ours, *peers = timings[:count]
    clock = case.clock if ours.device else "wall"
    bandwidth = yardstick.bandwidth(timings[count:]) if timings[count:] else None
    speed = case.floor_bytes / ours.median("device") / 1e9
    share = None if bandwidth is None else speed / bandwidth["yardstick_gigabytes_per_second"]
    alike = ("key", "tensors", "elements", "bytes_per_element", "floor_bytes", "working_set_bytes")
    return {
        **{name: getattr(case, name) for name in (*alike, "averaged")},
        "operation": case.title,
        "shapes": case.subject,
        "dtype": str(case.dtype).removeprefix("torch."),
        "cold_buffers": not case.host_cost,
        "clock": clock,
        "copy_bandwidth": bandwidth,
        "gigabytes_per_second": speed,
        "share_of_copy": share,
        "nanoseconds_per_tensor": ours.median(clock) / case.tensors * 1e9,
        "ours": _side(ours, clock),
        "peers": [_peer(peer, ours, clock) for peer in peers],
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    found: list[float] = np.quantile(values, (0.25, 0.75)).tolist()
    return found


def _side(timing: Timing, clock: str) -> Result:
    lower, upper = _quartiles(timing.laps(clock))
    both = ("wall", "device") if timing.device else ()
    return {
        "name": timing.name,
        "rounds": len(timing.laps(clock)),
        "median_seconds": timing.median(clock),
        "lower_quartile_seconds": lower,
        "upper_quartile_seconds": upper,
        **{f"{each}_median_seconds": timing.median(each) for each in both},
    }


def _peer(peer: Timing, ours: Timing, clock: str) -> Result:
    # Ratios are taken within rounds, whose laps are neighbours in time.
    rounds = np.array(peer.laps(clock)) / np.array(ours.laps(clock))
    both = ("wall", "device") if ours.device else ()
    return {
        **_side(peer, clock),
        "ratio": peer.median(clock) / ours.median(clock),
        **{f"{each}_ratio": peer.median(each) / ours.median(each) for each in both},
        "round_ratio": float(np.median(rounds)),
        "round_ratio_quartiles": _quartiles(rounds.tolist()),
    }


def settle_allocator() -> None:
    """Make glibc keep freed memory, as it would in a training process.

    glibc raises its threshold for separate mappings by itself when a block of up to 32 MiB is first
    freed. But it returns the end of the heap to the system whenever 64 MiB of it are free. By luck
    some candidates then fault in the same pages at every call, which makes them up to four times
    slower, and others never do.
    """
    with suppress(AttributeError):  # the C library is not glibc
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)


def measure_all(
    device: HostDevice,
    *,
    quick: bool,
    limit: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    on_case: Callable[[str], object] = lambda key: None,
) -> Iterator[Result]:
    """Measure the cases of one device; yield the whole result after each case.

    A kill thus loses at most one case. After `limit` seconds no further case begins. `on_case` is
    called with the key of each case that begins. Tests replace the clock.
    """
    began = clock()
    settle_allocator()
    yardstick = device.yardstick()
    free = device.free_bytes()
    alone = device.race(yardstick.candidates)
    alone.warm_up(1)
    found: Result = {
        "schema": SCHEMA,
        "created": now(),
        "command_line": list(sys.orig_argv),
        "quick": quick,
        "rehearsal": device.rehearsal,
        "environment": dict(device.environment),
        "copy_bandwidth": {
            **yardstick.bandwidth(alone.run(*device.efforts[True])),
            "buffer_bytes": yardstick.buffer_bytes,
        },
        "cases": [],
        "skipped": [],
    }
    for case in device.plan:
        if quick and not case.quick:
            continue
        needed = case.memory_needed(device.sets(case))
        if needed > free:
            reason = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB available"
        elif limit is not None and clock() - began > limit:
            reason = f"the limit of {limit:g} s was reached"
        else:
            on_case(case.key)
            reason = ""
            try:
                found["cases"].append(_measured(case, yardstick, device, quick))
            except RuntimeError as error:  # the other cases are still worth measuring
                reason = f"{FAILED}: {error}"
            if device.place.type == "cuda":  # free what the case has left
                gc.collect()
                torch.cuda.empty_cache()
        if reason:
            found["skipped"].append({"case": case.key, "reason": reason})
        yield _judged(found)
    yield _judged(found)


def _measured(case: Case, yardstick: CopyYardstick, device: HostDevice, quick: bool) -> Result:
    race, missing = contest(case, yardstick, device)
    race.warm_up(2)
    found = case_result(case, race.run(*device.efforts[quick]), yardstick)
    return {**found, "buffer_sets": device.sets(case), "unavailable": missing}


def _judged(found: Result) -> Result:
    known: list[Any] = [] if found["rehearsal"] else found["cases"]
    verdicts = judge(known, found["environment"]["device"])
    return {**found, "summaries": summaries(found["cases"]), "targets": verdicts}
