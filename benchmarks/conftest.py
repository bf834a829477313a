"""What `python -m pytest benchmarks` needs: threads, the yardstick, the race that feeds pytest-benchmark.

pytest-benchmark would time one candidate after the other. Here our call is the one it times, and the peers run in the
set-up of each of its rounds, so all of them are interleaved as in `python -m benchmarks`, from whose cases these come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.case import Case
from benchmarks.measure import Contest, CopyYardstick, HostDevice, settle_allocator
from benchmarks.timer import collector_paused

_SECONDS_PER_CASE = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    threads = min(2, os.cpu_count() or 1)
    parser.addoption("--threads", type=int, default=threads, help="threads of both sides")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[HostDevice]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    settle_allocator()
    yield HostDevice()
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def yardstick(device: HostDevice) -> CopyYardstick:
    return device.yardstick()


@pytest.fixture
def side_by_side(
    benchmark: Any, device: HostDevice, yardstick: CopyYardstick
) -> Callable[[Case], None]:
    """Races a case; its numbers go to pytest-benchmark's `extra_info`."""

    def run(case: Case) -> None:
        needed = case.memory_needed(device.sets(case))
        if needed > device.free_bytes():
            pytest.skip(f"needs {needed / 2**30:.1f} GiB of memory")
        contest = Contest(case, yardstick, device)
        contest.warm_up()
        start = time.perf_counter()
        contest.race.warm_up(1)
        rounds = int(_SECONDS_PER_CASE / (time.perf_counter() - start))

        def run_peers() -> None:
            for index in range(1, len(contest.race.candidates)):
                contest.race.lap(index)

        benchmark.group = case.key
        with collector_paused():
            benchmark.pedantic(
                lambda: contest.race.lap(0), setup=run_peers, rounds=max(5, min(rounds, 200))
            )
        result = contest.result()
        told = ("floor_bytes", "gigabytes_per_second", "share_of_copy", "nanoseconds_per_tensor")
        benchmark.extra_info.update({name: result[name] for name in told})
        benchmark.extra_info["ratios"] = {p["name"]: p["ratio"] for p in result["peers"]}

    return run
