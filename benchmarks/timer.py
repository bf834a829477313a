"""Time candidates in turns in one process, so that every ratio is between neighbours in time.

A shared or throttled machine drifts by tens of percent within a minute; taking turns puts the drift
on every candidate alike. `torch.utils.benchmark.Timer` would give clock and statistics, but its loop
measures one candidate after the other, and calls it twice more before each measurement.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LAP_SECONDS, _MAX_CALLS = 0.01, 64
# A launch queue holds about a thousand launches, so a longer head start would only cost time.
_LONGEST_HEAD_START = 0.05


@dataclass(frozen=True)
class Candidate:
    """Describes one implementation in a race."""

    name: str
    run: Callable[[], object]  # the timed call
    prepare: Callable[[], object] = lambda: None  # called before `run`, outside the timed region
    calls: int = 1  # measured calls that one `run` makes; laps are seconds per call

    def once(self) -> None:
        """Prepare and call the candidate, untimed."""
        self.prepare()
        self.run()


@dataclass(frozen=True)
class Timing:
    """Holds the laps of one candidate in seconds per call, by the host's and, if any, the GPU's clock."""

    name: str
    wall: Sequence[float]
    device: Sequence[float] = ()

    def laps(self, clock: str) -> Sequence[float]:
        """Return the laps by the clock "wall" or "device"; without a device's clock, both are the host's."""
        return self.device if clock == "device" and self.device else self.wall

    def median(self, clock: str = "wall") -> float:
        """Return the median lap in seconds."""
        return statistics.median(self.laps(clock))


def once_over(candidates: Sequence[Candidate]) -> Candidate:
    """Return a candidate whose `run` calls all of `candidates`, with cold data but warm code.

    This is as in training, where layer follows layer. After a flush of the caches the code would be
    as cold as the data.
    """

    def run() -> None:
        for candidate in candidates:
            candidate.run()

    def prepare() -> None:
        for candidate in candidates:
            candidate.prepare()

    return Candidate(candidates[0].name, run, prepare, len(candidates))


class Race:
    """Times candidates in turns.

    Each round begins with another candidate, so that none of three or more always follows the same
    one: after thousands of torch's small operations caches are colder than after one call of ours.

    Args:
        candidates: At least one candidate; ratios are taken against the first.
        clock: Clock of the host, in seconds.
    """

    def __init__(
        self, candidates: Sequence[Candidate], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.candidates = candidates
        self._clock = clock
        self._wall: list[list[float]] = [[] for _ in candidates]
        self._device: list[list[float]] = [[] for _ in candidates]

    def warm_up(self, rounds: int) -> None:
        """Run every candidate `rounds` times untimed, which creates state and touches pages."""
        for candidate in [*self.candidates] * rounds:
            candidate.once()
        self.calibrate()

    def calibrate(self) -> None:
        """Choose the number of calls per lap, which is always one here."""

    def lap(self, index: int) -> None:
        """Prepare and time one call of candidate `index`."""
        candidate = self.candidates[index]
        candidate.prepare()
        start = self._clock()
        candidate.run()
        self._wall[index].append((self._clock() - start) / candidate.calls)

    def run(self, seconds: float, min_rounds: int, max_rounds: int) -> list[Timing]:
        """Race until `seconds` are spent, preparation included, for `min_rounds` to `max_rounds` rounds.

        Python's cyclic garbage collector is switched off during the race.
        """
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            start = self._clock()
            count = len(self.candidates)
            turns = [*range(count)] * 2
            for finished in range(1, max_rounds + 1):
                # With two candidates, one that begins every other round would follow itself.
                first = (finished - 1) % count if count > 2 else 0
                for index in turns[first : first + count]:
                    self.lap(index)
                if finished >= min_rounds and self._clock() - start >= seconds:
                    break
        finally:
            if was_enabled:
                gc.enable()
        return self.timings()

    def timings(self) -> list[Timing]:
        """Return the timings so far, in the order of the candidates."""
        laps = zip(self.candidates, self._wall, self._device, strict=True)
        return [Timing(each.name, wall, device) for each, wall, device in laps]


class CudaEvents:
    """Gives a race what it needs of the current CUDA device's queue; rehearsals replace it."""

    def __init__(self) -> None:
        # torch's tests use this kernel, which is private; without it laps only lose their head start.
        self._sleep: Callable[[int], None] = getattr(torch.cuda, "_sleep", lambda cycles: None)
        probe = 20_000_000
        for _ in range(2):  # the first run raises the clock rate
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
        """Return the seconds between two time stamps that the device has passed."""
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        """Wait until the queue is empty."""
        torch.cuda.synchronize()

    def keep_busy(self, seconds: float) -> None:
        """Queue work that takes about `seconds`, so that the host can run ahead."""
        self._sleep(int(seconds * self._cycles_per_second))


class DeviceRace(Race):
    """Times laps of several back-to-back calls, twice per round: by the host's and the device's clock.

    Wall time is the time of a loop of steps with one synchronize at its end. It is what a training
    loop takes, including the host's work if that takes longer. GPU time is taken between two events
    after a head start for the host, so that the host's work does not count while the queue holds it.
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
        """Choose the number of calls so that a lap takes about 10 ms; measure the host's part."""
        for index, candidate in enumerate(self.candidates):
            self._events.synchronize()
            start = self._clock()
            candidate.once()
            candidate.once()
            queued = self._clock()
            self._events.synchronize()
            seconds = max((self._clock() - start) / 2, 1e-9)
            most = max(1, _MAX_CALLS // candidate.calls)
            self.calls[index] = min(max(1, math.ceil(_LAP_SECONDS / seconds)), most)
            host = (queued - start) / 2 * self.calls[index]
            self._head_start[index] = min(1.25 * host + 50e-6, _LONGEST_HEAD_START)

    def lap(self, index: int) -> None:
        """Time the calls of candidate `index` by both clocks.

        Preparation is timed too, since it is only a multiplication in Python.
        """
        candidate, events = self.candidates[index], self._events
        several = [candidate.once] * self.calls[index]
        calls = candidate.calls * len(several)
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
