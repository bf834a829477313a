"""Candidates side by side in one process, interleaved: every ratio is of neighbours in time.

A shared or throttled machine drifts by tens of per cent within a minute; taking turns puts the drift on every candidate
alike. `torch.utils.benchmark.Timer` measures one candidate after the other and calls it twice more before each
measurement, so its clock and its statistics would fit here, and its loop does not.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

_LAP_SECONDS, _MAX_CALLS = 0.01, 64
# A launch queue holds about a thousand launches; a longer head start would only be waited for.
_LONGEST_HEAD_START = 0.05


@dataclass(frozen=True)
class Candidate:
    """One implementation in a race."""

    name: str
    run: Callable[[], object]  # the timed call
    prepare: Callable[[], object] = lambda: None  # called before it, outside the timed region
    calls: int = 1  # of what is measured that one `run` makes; laps are seconds per call

    def once(self) -> None:
        """Prepare and call it, untimed."""
        self.prepare()
        self.run()


@dataclass(frozen=True)
class Timing:
    """The laps of one candidate in seconds a call, by the host's clock and, on a GPU, by the GPU's."""

    name: str
    wall: Sequence[float]
    device: Sequence[float] = ()

    def laps(self, clock: str) -> Sequence[float]:
        """Return the laps by the clock "wall" or "device"; those of the host where there is one clock."""
        return self.device if clock == "device" and self.device else self.wall

    def median(self, clock: str = "wall") -> float:
        """Return the median lap in seconds."""
        return statistics.median(self.laps(clock))


def rotating(candidates: Sequence[Candidate]) -> Candidate:
    """Make one candidate that takes turns over several sets of buffers, so that caches forget a set."""
    if len(candidates) == 1:
        return candidates[0]
    turns = cycle(candidates)
    return Candidate(candidates[0].name, lambda: next(turns).once())


def once_over(candidates: Sequence[Candidate]) -> Candidate:
    """Make one candidate that calls all of them in one go: its data is cold each time, its code is not.

    As in training, where layer follows layer; behind a flush of the caches the code would be as cold as the data.
    """

    def run() -> None:
        for candidate in candidates:
            candidate.run()

    def prepare() -> None:
        for candidate in candidates:
            candidate.prepare()

    return Candidate(candidates[0].name, run, prepare, len(candidates))


class Race:
    """Times candidates round-robin: first, second, ..., first, second, ...

    Args:
        candidates: at least one; ratios are taken against the first.
        clock: of the host, in seconds.
    """

    def __init__(
        self, candidates: Sequence[Candidate], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.candidates = candidates
        self._clock = clock
        self._wall: list[list[float]] = [[] for _ in candidates]
        self._device: list[list[float]] = [[] for _ in candidates]

    def warm_up(self, rounds: int) -> None:
        """Run every candidate `rounds` times untimed: creates states, touches pages."""
        for candidate in [*self.candidates] * rounds:
            candidate.once()
        self.calibrate()

    def calibrate(self) -> None:
        """Find out how many calls make a lap; here it is always one."""

    def lap(self, index: int) -> None:
        """Prepare and time one call of candidate `index`."""
        candidate = self.candidates[index]
        candidate.prepare()
        start = self._clock()
        candidate.run()
        self._wall[index].append((self._clock() - start) / candidate.calls)

    def run(self, seconds: float, min_rounds: int, max_rounds: int) -> list[Timing]:
        """Race until `seconds` are spent, preparation included, for `min_rounds` to `max_rounds` rounds.

        Python's cyclic garbage collector is off meanwhile.
        """
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            start = self._clock()
            for finished in range(1, max_rounds + 1):
                for index in range(len(self.candidates)):
                    self.lap(index)
                if finished >= min_rounds and self._clock() - start >= seconds:
                    break
        finally:
            if was_enabled:
                gc.enable()
        return self.timings()

    def timings(self) -> list[Timing]:
        """Return what was timed so far, in the order of the candidates."""
        laps = zip(self.candidates, self._wall, self._device, strict=True)
        return [Timing(each.name, wall, device) for each, wall, device in laps]


class CudaEvents:
    """What a race needs of the queue of the current CUDA device; replaced where there is none."""

    def __init__(self) -> None:
        # torch's own tests use this kernel; without it laps only lose their head start.
        self._sleep: Callable[[int], None] = getattr(torch.cuda, "_sleep", lambda cycles: None)
        probe = 20_000_000
        for _ in range(2):  # the first wakes the clocks
            start = self.mark()
            self._sleep(probe)
            end = self.mark()
            self.synchronize()
            self._cycles_per_second = probe / self.seconds_between(start, end)

    def mark(self) -> Any:
        """Queue a time stamp."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start: Any, end: Any) -> float:
        """Return the time between two stamps that the device has passed."""
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        """Wait until the queue is empty."""
        torch.cuda.synchronize()

    def keep_busy(self, seconds: float) -> None:
        """Queue work of about that length, so that the host can run ahead."""
        self._sleep(int(seconds * self._cycles_per_second))


class DeviceRace(Race):
    """Times several back-to-back calls a lap, twice a round: by the host's clock, by the device's.

    Wall time is that of a loop of steps with one synchronize at its end: what a training loop sees, the host's work
    included where that takes longer. GPU time is taken between two events behind a head start for the host, so that its
    work does not show, as long as the queue holds it.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        events: CudaEvents,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(candidates, clock)
        self._events = events
        self.calls = [1 for _ in candidates]
        self._head_start = [0.0 for _ in candidates]

    def calibrate(self) -> None:
        """Choose calls per lap, so that a lap takes about 10 ms; measure the host's part."""
        for index, candidate in enumerate(self.candidates):
            self._events.synchronize()
            start = self._clock()
            candidate.once()
            candidate.once()
            queued = self._clock()
            self._events.synchronize()
            seconds = max((self._clock() - start) / 2, 1e-9)
            self.calls[index] = min(max(1, math.ceil(_LAP_SECONDS / seconds)), _MAX_CALLS)
            host = (queued - start) / 2 * self.calls[index]
            self._head_start[index] = min(1.25 * host + 50e-6, _LONGEST_HEAD_START)

    def lap(self, index: int) -> None:
        """Time the calls of candidate `index` by both clocks; preparation is a multiplication in Python."""
        calls, events = self.calls[index], self._events
        several = [self.candidates[index].once] * calls
        events.synchronize()
        start = self._clock()
        for once in several:
            once()
        events.synchronize()
        self._wall[index].append((self._clock() - start) / calls)
        events.keep_busy(self._head_start[index])
        begin = events.mark()
        for once in several:
            once()
        end = events.mark()
        events.synchronize()
        self._device[index].append(events.seconds_between(begin, end) / calls)
