"""The benchmark harness: shapes, interleaved timer, derived numbers, equal work, reports."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import cases as bench_cases
from benchmarks import device as bench_device
from benchmarks import environment, measure, peers, report, shapes, targets
from benchmarks import run as bench
from benchmarks.table import Table
from benchmarks.timer import Candidate, Race, Timing, quartiles, ratio, round_ratios
from benchmarks.workload import Workload
from tests.study.pages_read_back import parsed, text_of

TINY = shapes.ModelShapes("tiny", "tiny", ((5,), (3, 7), (2, 3, 4)))


class FakeClock:
    """A clock that stands still unless it is told to move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scripted(name: str, clock: FakeClock, durations: list[float], log: list[str]) -> Candidate:
    """A candidate whose calls take the given times, in turn, and whose preparation takes 100 s."""
    remaining = list(durations)

    def prepare() -> None:
        log.append(f"prepare {name}")
        clock.now += 100.0

    def run() -> None:
        log.append(name)
        clock.now += remaining.pop(0)

    return Candidate(name, run, prepare)


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        (shapes.resnet50(), 161, 25_557_032),
        (shapes.gpt2_small(), 148, 124_439_808),
        (shapes.many_small(), 2000, 64_000),
        (shapes.one_tensor(26), 1, 2**26),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_shapes_have_the_published_sizes(
    model: shapes.ModelShapes, tensors: int, elements: int
) -> None:
    assert model.tensors == tensors
    assert model.elements == elements


def test_race_interleaves_and_times_only_the_calls() -> None:
    clock, log = FakeClock(), []
    race = Race(
        [
            scripted("ours", clock, [1.0, 2.0, 9.0], log),
            scripted("peer", clock, [4.0, 4.0, 27.0], log),
        ],
        clock,
    )
    rounds: list[int] = []
    ours, peer = race.run(0.0, 3, 3, lambda: rounds.append(len(rounds)))
    assert log == ["prepare ours", "ours", "prepare peer", "peer"] * 3
    assert ours.seconds == (1.0, 2.0, 9.0)
    assert peer.seconds == (4.0, 4.0, 27.0)
    assert rounds == [0, 1, 2]


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
    assert len(timing.seconds) == expected


def test_race_warms_up_untimed_and_pauses_the_collector() -> None:
    enabled: list[bool] = []
    race = Race([Candidate("ours", lambda: enabled.append(gc.isenabled()))])
    race.warm_up(2)
    assert race.timings()[0].seconds == ()
    race.run(0.0, 2, 2)
    assert enabled == [True, True, False, False]
    assert gc.isenabled()


def test_race_refuses_to_run_empty() -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        Race([])


def test_medians_quartiles_and_ratios() -> None:
    ours = Timing("ours", (1.0, 2.0, 3.0, 4.0, 10.0))
    peer = Timing("peer", (4.0, 4.0, 9.0, 16.0, 10.0))
    assert ours.median == 3.0
    assert ours.quartiles == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)
    assert ratio(peer, ours) == 3.0
    assert round_ratios(peer, ours) == [4.0, 2.0, 3.0, 4.0, 1.0]


def test_workload_keeps_the_clip_active() -> None:
    load = Workload(shapes.many_small(100, 32))
    for _ in range(20):
        load.tighten()
        before = torch.nn.utils.get_total_norm(load.grads)
        assert before > load.limit
        torch.nn.utils.clip_grad_norm_(load.params, load.limit)
    idle = Workload(TINY, clip_active=False)
    limit = idle.limit
    idle.tighten()
    assert idle.limit == limit > torch.nn.utils.get_total_norm(idle.grads)


@pytest.mark.parametrize("key", bench_cases.OPERATIONS)
def test_every_peer_does_the_same_work(key: str) -> None:
    """Equal parameters after a step, equal gradients after a clip or a penalty."""
    operation = bench_cases.OPERATIONS[key]
    left: dict[str, list[torch.Tensor]] = {}
    for build in operation.builds:
        load = operation.workload(TINY)
        candidate = build(load)
        for _ in range(3):
            candidate.prepare()
            candidate.run()
        steps = key not in {"clip_active", "clip_inactive", "clip_value", "add_penalty"}
        kept = load.params if steps and operation.params else load.grads
        left[candidate.name] = [tensor.detach() for tensor in kept]
    names = list(left)
    assert names[0] == "steadygrad"
    assert len(names) == len(operation.builds), "two peers with one name"
    for name in names[1:]:
        torch.testing.assert_close(left["steadygrad"], left[name], rtol=1e-5, atol=1e-6)


def test_case_keys_are_unique_and_targets_refer_to_them() -> None:
    for plan, floors in (
        (bench_cases.CASES, targets.TARGETS),
        (bench_cases.CUDA_CASES, targets.CUDA_TARGETS),
    ):
        keys = [case.key for case in plan]
        assert len(set(keys)) == len(keys)
        for target in (target for target in floors if not target.over):
            (case,) = [case for case in plan if case.key == target.case]
            assert isinstance(case, bench_cases.ModelCase)
            load = case.operation.workload(TINY)
            names = {build(load).name for build in case.operation.peers}
            assert target.peer in names | {targets.COPY}


@pytest.fixture
def yardstick(monkeypatch: pytest.MonkeyPatch) -> measure.CopyYardstick:
    monkeypatch.setattr(measure, "_SMALLEST_BUFFER", 2**10)
    return measure.CopyYardstick(cache_bytes=2**10)


def test_derived_numbers(yardstick: measure.CopyYardstick) -> None:
    case = bench_cases.ModelCase(bench_cases.OPERATIONS["adamw"], shapes.one_tensor(20))
    laps = {"ours": 1e-3, "a": 2e-3, "b": 3e-3, "c": 5e-3, "copy_": 4e-6, "mul_": 2e-6}
    timings = [Timing(name, (lap, lap)) for name, lap in laps.items()]
    result = measure.summarise(case, timings, yardstick)
    assert [peer.ratio for peer in result.peers] == [2.0, 3.0, 5.0]
    assert case.floor_bytes == 32 * 2**20
    assert result.gigabytes_per_second == pytest.approx(32 * 2**20 / 1e-3 / 1e9)
    assert result.nanoseconds_per_tensor == pytest.approx(1e6)
    assert result.bandwidth is not None
    assert result.bandwidth.yardstick == 2 * yardstick.buffer_bytes / 2e-6 / 1e9
    assert result.share_of_copy == result.gigabytes_per_second / result.bandwidth.yardstick


def test_verdicts() -> None:
    case = next(case for case in bench_cases.CASES if case.key == "clip_active/small")
    peer = Timing(peers.TORCH_FOREACH, (12.0,))
    result = measure.CaseResult(
        case,
        Timing("steadygrad", (1.0,)),
        (measure.PeerResult(peer, 12.0, 12.0, (12.0, 12.0)),),
        None,
    )
    verdicts = {verdict.target.case: verdict for verdict in targets.judge([result])}
    assert verdicts["clip_active/small"].met is True
    assert verdicts["clip_active/resnet50"].met is None


def test_run_reports_and_writes_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = tuple(
        bench_cases.ModelCase(bench_cases.OPERATIONS[key], TINY, quick=True, host_cost=host)
        for key, host in (("clip_active", False), ("adamw", True))
    )
    hungry = bench_cases.ModelCase(
        bench_cases.OPERATIONS["adam"], shapes.one_tensor(50), quick=True
    )
    monkeypatch.setattr(bench_device, "CASES", (*chosen, hungry))
    effort = measure.Effort(seconds=0.0, min_rounds=3, max_rounds=3)
    monkeypatch.setattr(bench_device, "QUICK", effort)
    monkeypatch.setattr(bench, "QUICK", effort)
    monkeypatch.setattr(measure, "_SMALLEST_BUFFER", 2**16)
    monkeypatch.setattr(environment, "cache_bytes", lambda: 2**10)
    threads = torch.get_num_threads()
    console = Console(file=io.StringIO(), width=100)
    out = tmp_path / "results" / "bench.json"
    page = tmp_path / "pages" / "bench.html"
    assert bench.run(console, quick=True, out=out, page=page, threads=1, targets=True) == 0
    assert torch.get_num_threads() == threads

    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for expected in ("clip_grad_norm_, active", "torch foreach", "of copy", "not run", "GB/s"):
        assert expected in text
    assert f"skipped {hungry.key}: needs" in text
    shown = parsed(page.read_text(encoding="utf-8"))
    for expected in ("clip + AdamW", f"{hungry.key}: needs", "those of the quick table"):
        assert expected in text_of(shown)

    found = json.loads(out.read_text())
    assert found["schema"] == report.SCHEMA
    assert found["environment"]["threads"] == 1
    assert found["environment"]["device"] == "cpu"
    assert found["environment"]["gpu"] is None
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", found["environment"]["revision"])
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", found["environment"]["csrc_tree"])
    assert found["rehearsal"] is False
    assert found["command_line"] == sys.orig_argv
    assert found["copy_bandwidth"]["yardstick_gigabytes_per_second"] > 0
    assert [case["key"] for case in found["cases"]] == [case.key for case in chosen]
    assert [entry["case"] for entry in found["skipped"]] == [hungry.key]
    assert {entry["met"] for entry in found["targets"]} == {None}
    clip, step = found["cases"]
    assert clip["share_of_copy"] > 0
    assert step["share_of_copy"] is None
    assert clip["bytes_per_element"] == 12
    assert clip["clock"] == "wall" and "wall_median_seconds" not in clip["ours"]
    for side in (clip["ours"], *clip["peers"]):
        assert side["rounds"] == 3
        lower, upper = side["lower_quartile_seconds"], side["upper_quartile_seconds"]
        assert 0 < lower <= side["median_seconds"] <= upper


def test_a_case_that_fails_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(load: Workload) -> Candidate:
        raise RuntimeError("out of luck")

    operation = dataclasses.replace(bench_cases.OPERATIONS["clip_value"], build=broken)
    plan = (
        bench_cases.ModelCase(operation, TINY, host_cost=True),
        bench_cases.ModelCase(bench_cases.OPERATIONS["clip_active"], TINY, host_cost=True),
    )
    monkeypatch.setattr(bench_device, "CASES", plan)
    effort = measure.Effort(seconds=0.0, min_rounds=2, max_rounds=2)
    monkeypatch.setattr(bench_device, "FULL", effort)
    monkeypatch.setattr(bench, "QUICK", effort)
    out = tmp_path / "bench.json"
    assert bench.run(Console(file=io.StringIO()), quick=False, out=out, threads=1) == 1
    found = json.loads(out.read_text())
    assert [case["key"] for case in found["cases"]] == ["clip_active/tiny"]
    assert found["skipped"] == [{"case": "clip_value/tiny", "reason": "failed: out of luck"}]


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_console_cuts_nothing_off(width: int) -> None:
    table = Table("Times", ("case", "peer"), ("ours ms", "ratio"))
    table.add(
        "a case of a rather long name, of which nothing is to be lost",
        "torch foreach",
        "12.3",
        "4.56",
    )
    shown = io.StringIO()
    bench._print_whole(Console(file=shown, width=width), table)
    assert str(table) in shown.getvalue()
    shown = io.StringIO()
    bench._print_whole(Console(file=shown, width=table.width), table)
    assert re.search(r"nothing is to be lost +torch foreach +12\.3 +4\.56", shown.getvalue())
    assert str(table) not in shown.getvalue()


def test_run_refuses_no_threads() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        bench.run(Console(file=io.StringIO()), quick=True, out=None, threads=0)
