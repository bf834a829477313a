"""Laps on a device that works on its own: GPU time by its clock, wall time by the host's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks.timer import Candidate, Race, Timing

_LAP_SECONDS = 0.01
_MAX_CALLS = 64
# A launch queue holds about a thousand launches; a longer head start would only be waited for.
_LONGEST_HEAD_START = 0.05


class Events(Protocol):
    """What a race needs of a device's queue; replaced where there is no device."""

    def mark(self) -> Any:
        """Queue a time stamp."""

    def seconds_between(self, start: Any, end: Any) -> float:
        """Time between two stamps that the device has passed."""

    def synchronize(self) -> None:
        """Wait until the queue is empty."""

    def keep_busy(self, seconds: float) -> None:
        """Queue work of about that length, so that the host can run ahead."""


class CudaEvents:
    """The current CUDA device's events."""

    _PROBE_CYCLES = 20_000_000

    def __init__(self) -> None:
        # torch's own tests use this kernel; without it laps only lose their head start.
        self._sleep: Callable[[int], None] | None = getattr(torch.cuda, "_sleep", None)
        self._cycles_per_second = 0.0
        if self._sleep is not None:
            for _ in range(2):  # the first wakes the clocks
                start = self.mark()
                self._sleep(self._PROBE_CYCLES)
                end = self.mark()
                self.synchronize()
                self._cycles_per_second = self._PROBE_CYCLES / self.seconds_between(start, end)

    def mark(self) -> torch.cuda.Event:
        """Record an event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Elapsed GPU time."""
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize()

    def keep_busy(self, seconds: float) -> None:
        """Spin in a kernel of one thread."""
        if self._sleep is not None:
            self._sleep(int(seconds * self._cycles_per_second))


class DeviceRace(Race):
    """Times several back-to-back calls a lap, twice a round: by the host's clock, by the device's.

    Wall time is that of a loop of steps with one synchronize at its end: what a training loop sees,
    the host's work included where that takes longer. GPU time is taken between two events behind a
    head start for the host, so that its work does not show, as long as the queue holds it.
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
        self._device: list[list[float]] = [[] for _ in self.candidates]
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
        self._laps[index].append((self._clock() - start) / calls)

        events.keep_busy(self._head_start[index])
        begin = events.mark()
        self._call(candidate, calls)
        end = events.mark()
        events.synchronize()
        self._device[index].append(events.seconds_between(begin, end) / calls)

    def timings(self) -> list[Timing]:
        """The laps so far; those by the host's clock count until a case says otherwise."""
        return [
            Timing(candidate.name, tuple(wall), tuple(wall), tuple(device))
            for candidate, wall, device in zip(
                self.candidates, self._laps, self._device, strict=True
            )
        ]

    @staticmethod
    def _call(candidate: Candidate, times: int) -> None:
        # Preparation is a multiplication in Python; it is in the time of every candidate.
        for _ in range(times):
            candidate.prepare()
            candidate.run()
