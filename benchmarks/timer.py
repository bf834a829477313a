"""The one timer of all benchmarks: candidates side by side in one process, interleaved, medians.

A shared or throttled machine drifts by tens of per cent within a minute. Interleaving puts the
drift on every candidate alike, so ratios stay comparable where absolute times do not.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle


def _nothing() -> None:
    """The preparation of a candidate that needs none."""


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
    """The timed laps of one candidate, one per round, in seconds a call.

    Attributes:
        name: of the candidate.
        seconds: the laps that count: medians and ratios are taken of these.
        wall: on a GPU, the laps by the host's clock, up to the end of the work; else empty.
        device: on a GPU, the laps by the GPU's clock; else empty.
    """

    name: str
    seconds: tuple[float, ...]
    wall: tuple[float, ...] = ()
    device: tuple[float, ...] = ()

    def counting(self, clock: str) -> Timing:
        """The same laps, where those of the clock "wall" or "device" count."""
        return replace(self, seconds=self.device if clock == "device" else self.wall)

    @property
    def median(self) -> float:
        """Median lap time in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the lap times in seconds."""
        return quartiles(self.seconds)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile, linearly interpolated; a single value is both."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def ratio(peer: Timing, ours: Timing) -> float:
    """median(peer) / median(ours): how many times faster ours is."""
    return peer.median / ours.median


def rotating(candidates: Sequence[Candidate]) -> Candidate:
    """One candidate that takes turns over several sets of buffers, so that caches forget a set."""
    if len(candidates) == 1:
        return candidates[0]
    turns = cycle(candidates)

    def run() -> None:
        candidate = next(turns)
        candidate.prepare()
        candidate.run()

    return Candidate(candidates[0].name, run)


def once_over(candidates: Sequence[Candidate]) -> Candidate:
    """One candidate that calls all of them in one go: its data is cold each time, its code is not.

    As in training, where layer follows layer; behind a flush of the caches the code would be as cold
    as the data, which no training loop sees.
    """

    def run() -> None:
        for candidate in candidates:
            candidate.run()

    def prepare() -> None:
        for candidate in candidates:
            candidate.prepare()

    return Candidate(candidates[0].name, run, prepare, len(candidates))


def round_ratios(peer: Timing, ours: Timing) -> list[float]:
    """Laps of the peer over ours, round by round; both laps of a round are neighbours in time."""
    return [p / o for p, o in zip(peer.seconds, ours.seconds, strict=True)]


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
        """Take the candidates.

        Args:
            candidates: at least one; the first is the one that ratios are taken against.
            clock: returns the time in seconds; replaced in tests.

        Raises:
            ValueError: there are no candidates.
        """
        if not candidates:
            raise ValueError("Race: candidates must hold at least one candidate, got none")
        self.candidates = tuple(candidates)
        self._clock = clock
        self._laps: list[list[float]] = [[] for _ in candidates]

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
        self._laps[index].append((self._clock() - start) / candidate.calls)

    def run(
        self,
        seconds: float,
        min_rounds: int,
        max_rounds: int,
        on_round: Callable[[], object] = _nothing,
    ) -> list[Timing]:
        """Race until `seconds` are spent, for `min_rounds` to `max_rounds` rounds.

        Args:
            seconds: time budget, preparation included.
            min_rounds: rounds that are run even beyond the budget.
            max_rounds: rounds after which the race ends early.
            on_round: called after each round, outside the timed region.

        Returns:
            One `Timing` per candidate, in their order.
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
        """The laps so far, one `Timing` per candidate."""
        return [
            Timing(candidate.name, tuple(laps))
            for candidate, laps in zip(self.candidates, self._laps, strict=True)
        ]
