"""Run every case of the CPU in pytest-benchmark: ``python -m pytest benchmarks -k adamw``.

pytest-benchmark would time one candidate after the other. Here it times our call only, and the peers
run in the set-up of each round, so that all candidates take turns as in ``python -m benchmarks``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.case import Case
from benchmarks.measure import HostDevice, case_result, contest, settle_allocator

_ROUNDS = 30


@pytest.fixture(scope="module")
def device() -> Iterator[HostDevice]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    settle_allocator()
    yield HostDevice()
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", HostDevice.plan, ids=lambda case: case.key)
def test_speed(case: Case, device: HostDevice, benchmark: Any) -> None:
    needed = case.memory_needed(device.sets(case))
    if needed > device.free_bytes():
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of memory")
    yardstick = device.yardstick()
    race, _ = contest(case, yardstick, device)
    race.warm_up(2)

    def run_peers() -> None:
        for index in range(1, len(race.candidates)):
            race.lap(index)

    benchmark.group = case.key
    benchmark.pedantic(lambda: race.lap(0), setup=run_peers, rounds=_ROUNDS)
    result = case_result(case, race.timings(), yardstick)
    told = ("floor_bytes", "gigabytes_per_second", "share_of_copy", "nanoseconds_per_tensor")
    benchmark.extra_info.update({name: result[name] for name in told})
    benchmark.extra_info["ratios"] = {peer["name"]: peer["ratio"] for peer in result["peers"]}
