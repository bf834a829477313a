"""What all benchmarks here share: threads, the yardstick, the race that feeds pytest-benchmark.

pytest-benchmark would time one candidate after the other. Here our call is the one it times, and
the peers run in the set-up of each of its rounds, so all of them are interleaved as in
`python -m benchmarks`, from whose cases these come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.case import Case
from benchmarks.device import HostDevice
from benchmarks.measure import (
    CaseResult,
    Contest,
    CopyYardstick,
    settle_allocator,
)
from benchmarks.report import cases_table
from benchmarks.timer import collector_paused

_SECONDS_PER_CASE = 2.0
_RESULTS = pytest.StashKey[list[CaseResult]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of both sides"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = []


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    settle_allocator()
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device(threads: int) -> HostDevice:
    return HostDevice()


@pytest.fixture(scope="session")
def yardstick(device: HostDevice) -> CopyYardstick:
    return device.yardstick()


@pytest.fixture
def side_by_side(
    request: pytest.FixtureRequest,
    benchmark: Any,
    device: HostDevice,
    yardstick: CopyYardstick,
) -> Callable[[Case], None]:
    """Races a case; its numbers go to pytest-benchmark's `extra_info` and to the final table."""

    def run(case: Case) -> None:
        needed = case.memory_needed(device.ground.sets(case))
        if needed > device.free_bytes():
            pytest.skip(f"needs {needed / 2**30:.1f} GiB of memory")
        contest = Contest(case, yardstick, device.ground)
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
        benchmark.extra_info.update(
            floor_bytes=case.floor_bytes,
            gigabytes_per_second=result.gigabytes_per_second,
            share_of_copy=result.share_of_copy,
            nanoseconds_per_tensor=result.nanoseconds_per_tensor,
            ratios={peer.timing.name: peer.ratio for peer in result.peers},
        )
        request.config.stash[_RESULTS].append(result)

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash[_RESULTS]
    if results:
        threads = config.getoption("--threads")
        terminalreporter.write(f"\n{cases_table(results, f'threads: {threads}')}\n")
