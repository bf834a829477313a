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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import torch

_LAP_SECONDS, _MAX_CALLS = 0.01, 64
# A launch queue holds about a thousand launches; a longer head start would only be waited for.
_LONGEST_HEAD_START = 0.05


def _nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Candidate:
    """One implementation in a race.

    Attributes:
        name: what the tables call it.
        run: the timed call.
        prepare: called before each timed call, outside the timed region.
        calls: how many calls of what is measured one `run` makes; laps are seconds per call.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """The laps of one candidate in seconds a call, by the host's clock and, on a GPU, by the GPU's."""

    name: str
    wall: tuple[float, ...]
    device: tuple[float, ...] = ()

    def laps(self, clock: str) -> tuple[float, ...]:
        """Return the laps by the clock "wall" or "device"; those of the host where there is one clock."""
        return self.device if clock == "device" and self.device else self.wall

    def median(self, clock: str = "wall") -> float:
        """Return the median lap in seconds."""
        return statistics.median(self.laps(clock))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and upper quartile, linearly interpolated; a single value is both."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def rotating(candidates: Sequence[Candidate]) -> Candidate:
    """Make one candidate that takes turns over several sets of buffers, so that caches forget a set."""
    if len(candidates) == 1:
        return candidates[0]
    turns = cycle(candidates)

    def run() -> None:
        candidate = next(turns)
        candidate.prepare()
        candidate.run()

    return Candidate(candidates[0].name, run)


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


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's cyclic garbage collector out of the timed region."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Race:
    """Times candidates round-robin: first, second, ..., first, second, ..."""

    def __init__(
        self, candidates: Sequence[Candidate], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Take at least one candidate, the first of which ratios are taken against, and a clock in seconds.

        Raises:
            ValueError: there are no candidates.
        """
        if not candidates:
            raise ValueError("Race: candidates must hold at least one candidate, got none")
        self.candidates = tuple(candidates)
        self._clock = clock
        self._wall: list[list[float]] = [[] for _ in candidates]
        self._device: list[list[float]] = [[] for _ in candidates]

    def warm_up(self, rounds: int) -> None:
        """Run every candidate `rounds` times untimed: creates states, touches pages."""
        for _ in range(rounds):
            for candidate in self.candidates:
                candidate.prepare()
                candidate.run()

    def calibrate(self) -> None:
        """Find out how many calls make a lap; here it is always one."""

    def lap(self, index: int) -> None:
        """Prepare and time one call of candidate `index`."""
        candidate = self.candidates[index]
        candidate.prepare()
        start = self._clock()
        candidate.run()
        self._wall[index].append((self._clock() - start) / candidate.calls)

    def run(
        self,
        seconds: float,
        min_rounds: int,
        max_rounds: int,
        on_round: Callable[[], object] = _nothing,
    ) -> list[Timing]:
        """Race until `seconds` are spent, preparation included, for `min_rounds` to `max_rounds` rounds.

        `on_round` is called after each round, outside the timed region.
        """
        with collector_paused():
            start = self._clock()
            for finished in range(1, max_rounds + 1):
                for index in range(len(self.candidates)):
                    self.lap(index)
                on_round()
                if finished >= min_rounds and self._clock() - start >= seconds:
                    break
        return self.timings()

    def timings(self) -> list[Timing]:
        """Return the laps so far, one `Timing` per candidate."""
        laps = zip(self.candidates, self._wall, self._device, strict=True)
        return [Timing(each.name, tuple(wall), tuple(device)) for each, wall, device in laps]


class Events(Protocol):
    """What a race needs of a device's queue; replaced where there is no device."""

    def mark(self) -> Any:
        """Queue a time stamp."""

    def seconds_between(self, start: Any, end: Any) -> float:
        """Return the time between two stamps that the device has passed."""

    def synchronize(self) -> None:
        """Wait until the queue is empty."""

    def keep_busy(self, seconds: float) -> None:
        """Queue work of about that length, so that the host can run ahead."""


class CudaEvents:
    """The current CUDA device's events."""

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

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def keep_busy(self, seconds: float) -> None:
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
        events: Events,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take the candidates, the device's events and the host's clock."""
        super().__init__(candidates, clock)
        self._events = events
        self.calls = [1 for _ in self.candidates]
        self._head_start = [0.0 for _ in self.candidates]

    def calibrate(self) -> None:
        """Choose calls per lap, so that a lap takes about 10 ms; measure the host's part."""
        for index, candidate in enumerate(self.candidates):
            self._events.synchronize()
            start = self._clock()
            self._call(candidate, 2)
            queued = self._clock()
            self._events.synchronize()
            seconds = max((self._clock() - start) / 2, 1e-9)
            self.calls[index] = min(max(1, math.ceil(_LAP_SECONDS / seconds)), _MAX_CALLS)
            host = (queued - start) / 2 * self.calls[index]
            self._head_start[index] = min(1.25 * host + 50e-6, _LONGEST_HEAD_START)

    def lap(self, index: int) -> None:
        """Time the calls of candidate `index` by both clocks."""
        candidate, calls, events = self.candidates[index], self.calls[index], self._events
        events.synchronize()
        start = self._clock()
        self._call(candidate, calls)
        events.synchronize()
        self._wall[index].append((self._clock() - start) / calls)
        events.keep_busy(self._head_start[index])
        begin = events.mark()
        self._call(candidate, calls)
        end = events.mark()
        events.synchronize()
        self._device[index].append(events.seconds_between(begin, end) / calls)

    @staticmethod
    def _call(candidate: Candidate, times: int) -> None:
        # Preparation is a multiplication in Python; it is in the time of every candidate.
        for _ in range(times):
            candidate.prepare()
            candidate.run()
