"""Tests the interleaved timer, by the host's clock and on a device with its own queue and clock."""

from __future__ import annotations

import gc
import itertools

import pytest

from benchmarks.timer import Candidate, DeviceRace, Race, Timing, once_over


class FakeClock:
    """Stands still unless it is told to move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scripted(name: str, clock: FakeClock, durations: list[float], log: list[str]) -> Candidate:
    """Return a candidate whose calls take the given times in turn, and whose preparation takes 100 s."""
    remaining = list(durations)

    def prepare() -> None:
        log.append(f"prepare {name}")
        clock.now += 100.0

    def run() -> None:
        log.append(name)
        clock.now += remaining.pop(0)

    return Candidate(name, run, prepare)


def test_race_interleaves_and_times_only_the_calls() -> None:
    clock, log = FakeClock(), []
    race = Race(
        [
            scripted("ours", clock, [1.0, 2.0, 9.0], log),
            scripted("peer", clock, [4.0, 4.0, 27.0], log),
        ],
        clock,
    )
    ours, peer = race.run(0.0, 3, 3)
    assert log == ["prepare ours", "ours", "prepare peer", "peer"] * 3
    assert ours.wall == [1.0, 2.0, 9.0]
    assert peer.wall == [4.0, 4.0, 27.0]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_candidate_follows_itself_and_of_three_none_always_the_same(count: int) -> None:
    log: list[int] = []
    candidates = [Candidate(str(i), lambda i=i: log.append(i)) for i in range(count)]  # type: ignore[misc]
    Race(candidates).run(0.0, 2 * count, 2 * count)
    followers = {i: {b for a, b in itertools.pairwise(log) if a == i} for i in range(count)}
    assert all(i not in after for i, after in followers.items())
    assert count == 2 or all(len(after) > 1 for after in followers.values())
    assert [log.count(i) for i in range(count)] == [2 * count] * count


@pytest.mark.parametrize(
    ("seconds", "least", "most", "expected"),
    [(0.0, 3, 10, 3), (5.0, 1, 10, 5), (1e9, 1, 4, 4)],
    ids=["at least", "budget", "at most"],
)
def test_race_keeps_its_budget(seconds: float, least: int, most: int, expected: int) -> None:
    clock = FakeClock()

    def run() -> None:
        clock.now += 1.0

    (timing,) = Race([Candidate("ours", run)], clock).run(seconds, least, most)
    assert len(timing.wall) == expected


def test_race_warms_up_untimed_and_pauses_the_collector() -> None:
    enabled: list[bool] = []
    race = Race([Candidate("ours", lambda: enabled.append(gc.isenabled()))])
    race.warm_up(2)
    assert len(race.run(0.0, 2, 2)[0].wall) == 2
    assert enabled == [True, True, False, False]
    assert gc.isenabled()


def test_medians() -> None:
    ours = Timing("ours", (1.0, 2.0, 3.0, 4.0, 10.0), (5.0, 7.0))
    assert ours.median() == 3.0
    assert ours.median("device") == 6.0
    assert Timing("ours", (1.0,)).laps("device") == (1.0,)


class Queue:
    """Imitates a device that works through its queue while the host goes on."""

    def __init__(self) -> None:
        self.host = 0.0
        self.device = 0.0
        self.head_starts: list[float] = []

    def clock(self) -> float:
        return self.host

    def launch(self, host_seconds: float, device_seconds: float) -> None:
        self.host += host_seconds
        self.device = max(self.host, self.device) + device_seconds

    def mark(self) -> float:
        self.device = max(self.host, self.device)
        return self.device

    def seconds_between(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def keep_busy(self, seconds: float) -> None:
        self.head_starts.append(seconds)
        self.device = max(self.host, self.device) + seconds


def launching(queue: Queue, name: str, host: float, device: float) -> Candidate:
    return Candidate(name, lambda: queue.launch(host, device))


def test_wall_time_is_a_loops_and_device_time_leaves_the_host_out() -> None:
    queue = Queue()
    race = DeviceRace(
        [
            launching(queue, "host-bound", host=1e-4, device=1e-5),
            launching(queue, "device-bound", host=1e-5, device=1e-3),
        ],
        queue,
        queue.clock,
    )
    race.warm_up(1)
    race.calibrate()
    host_bound, device_bound = race.run(0.0, 3, 3)
    assert host_bound.wall == pytest.approx([1e-4] * 3, rel=0.05)
    assert host_bound.device == pytest.approx([1e-5] * 3)
    assert device_bound.wall == pytest.approx([1e-3] * 3, rel=0.05)
    assert device_bound.device == pytest.approx([1e-3] * 3)
    assert host_bound.laps("device") == host_bound.device
    assert host_bound.laps("wall") == host_bound.wall


def test_a_lap_is_long_enough_to_time_and_no_longer() -> None:
    queue = Queue()
    times = {"fast": 1e-6, "middling": 1e-3, "slow": 0.3}
    race = DeviceRace(
        [launching(queue, name, 1e-7, seconds) for name, seconds in times.items()],
        queue,
        queue.clock,
    )
    race.calibrate()
    assert race.calls[0] == 64
    assert race.calls[1] == pytest.approx(10, abs=1)
    assert race.calls[2] == 1
    race.run(0.0, 1, 1)
    assert len(queue.head_starts) == 3
    assert max(queue.head_starts) < 1e-3


def test_a_lap_over_several_sets_is_no_longer_and_gives_seconds_per_call() -> None:
    queue = Queue()
    over_sets = once_over([launching(queue, "ours", 1e-7, 1e-5) for _ in range(5)])
    race = DeviceRace([over_sets], queue, queue.clock)
    race.calibrate()
    assert race.calls[0] == 64 // 5
    (timing,) = race.run(0.0, 1, 1)
    assert timing.wall == pytest.approx([1e-5], rel=0.05)
    assert timing.device == pytest.approx([1e-5])


def logging_candidates(log: list[str], count: int) -> list[Candidate]:
    return [
        Candidate(
            "ours", lambda n=n: log.append(f"run {n}"), lambda n=n: log.append(f"prepare {n}")
        )
        for n in range(count)
    ]


def test_once_over_calls_each_and_counts_them() -> None:
    log: list[str] = []
    several = logging_candidates(log, 3)
    candidate = once_over(several)
    ticks = iter([10.0, 16.0])
    race = Race([candidate], clock=lambda: next(ticks))
    race.lap(0)
    assert log == [f"{what} {n}" for what in ("prepare", "run") for n in range(3)]
    assert candidate.name == "ours"
    assert race._wall == [[2.0]]
