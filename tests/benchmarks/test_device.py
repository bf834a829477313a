"""The benchmark on a device with its own queue and clock, here played by a script."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, environment, measure, peers, report, shapes, source, targets
from benchmarks import device as bench_device
from benchmarks import run as bench
from benchmarks.device_timer import DeviceRace
from benchmarks.environment import Gpu
from benchmarks.timer import Candidate, Race, Timing, once_over, rotating
from study.console import PlainConsole

TINY = shapes.ModelShapes("tiny", "tiny", ((5,), (3, 7), (2, 3, 4)))
GPU = Gpu("NVIDIA Test", "sm_90", 132, 2**37, 2**12, "580.1", "13.0", "13.0", "13.0.88")


class Queue:
    """A device that works through its queue while the host goes on."""

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
    assert host_bound.counting("device").seconds == host_bound.device
    assert host_bound.counting("wall").seconds == host_bound.seconds == host_bound.wall


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


def logging_candidates(log: list[str], count: int) -> list[Candidate]:
    return [
        Candidate(
            "ours", lambda n=n: log.append(f"run {n}"), lambda n=n: log.append(f"prepare {n}")
        )
        for n in range(count)
    ]


def test_rotating_takes_turns_and_prepares_each() -> None:
    log: list[str] = []
    several = logging_candidates(log, 2)
    candidate = rotating(several)
    for _ in range(3):
        candidate.prepare()
        candidate.run()
    assert candidate.name == "ours"
    expected = ["prepare 0", "run 0", "prepare 1", "run 1", "prepare 0", "run 0"]
    assert log == expected
    assert rotating(several[:1]) is several[0]


def test_once_over_calls_each_and_counts_them() -> None:
    log: list[str] = []
    several = logging_candidates(log, 3)
    candidate = once_over(several)
    ticks = iter([10.0, 16.0])
    race = Race([candidate], clock=lambda: next(ticks))
    race.lap(0)
    assert log == [f"{what} {n}" for what in ("prepare", "run") for n in range(3)]
    assert candidate.name == "ours"
    assert race.timings()[0].seconds == (2.0,)


@pytest.mark.parametrize("key", ["batch_norm/32x512x7x7_fp32_nhwc", "adam/resnet50"])
def test_what_allocates_is_called_over_more_buffers_than_a_cache_holds(key: str) -> None:
    device = bench_device.HostDevice()
    (case,) = (case for case in device.cases() if case.key.startswith(key))
    sets = device.ground.sets(case)
    if case.allocates:
        assert sets * case.working_set_bytes >= 4 * device.environment.cache_bytes
    else:
        assert sets == 1


class FakeDevice(bench_device.CudaDevice):
    """A device whose tensors are the host's and whose clock is its too."""

    def __init__(self, plan: Sequence[cases.Case], free: int = 2**40) -> None:
        self._plan = plan
        self._free = free
        queue = Queue()
        self._prepare(environment.this_machine(GPU), torch.device("cpu"), queue)
        self.queue = queue
        race = partial(DeviceRace, events=queue, clock=queue.clock)
        self.ground = dataclasses.replace(self.ground, race=race)

    def cases(self) -> Sequence[cases.Case]:
        return self._plan

    def effort(self, quick: bool) -> measure.Effort:
        return measure.Effort(seconds=0.0, min_rounds=2, max_rounds=2)

    def free_bytes(self) -> int:
        return self._free

    def yardstick(self) -> measure.CopyYardstick:
        queue = self.queue
        stick = measure.GpuYardstick(torch.device("cpu"), elements=2**10)
        stick.candidates = (launching(queue, "copy_", 0.0, 1e-6),)
        return stick

    def release(self) -> None:
        pass


def ticking(queue: Queue, name: str, host: float, device: float) -> Any:
    return lambda load: launching(queue, name, host, device)


def scripted_run(tmp_path: Path, **options: Any) -> tuple[bench.report.Run, dict[str, Any]]:
    """Two cases, one on each side of the size where the clock changes, and one without memory."""
    device = FakeDevice([])
    queue = device.queue

    def broken(load: object) -> Candidate:
        raise RuntimeError("`fused=True` is not supported here\nby this torch")

    operation = cases.Operation(
        "adamw", "clip + AdamW", 32, 4, ticking(queue, "steadygrad", 1e-5, 2e-5),
        (ticking(queue, peers.CLIP_FUSED, 2e-4, 3e-5), broken),
    )  # fmt: skip
    small = shapes.ModelShapes("small", "small", ((8,),) * 4)
    large = shapes.one_tensor(28)
    huge = shapes.one_tensor(50)
    operation_on = {
        model.key: cases.ModelCase(operation, model, host_cost=model is small)
        for model in (small, large, huge)
    }

    # Buffers of that size are not drawn: no candidate looks at them.
    device._plan = list(operation_on.values())
    found = bench.measure_all(PlainConsole(), device, quick=False, **options)
    out = tmp_path / "new" / "found.json"
    bench.show(PlainConsole(), found, out)
    return found, json.loads(out.read_text())


@pytest.fixture(autouse=True)
def no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.Operation, "workload", lambda *_: None)


def test_a_result_file_has_both_clocks_and_what_the_gpu_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, written = scripted_run(tmp_path)
    text = capsys.readouterr().out
    assert written["schema"] == report.SCHEMA
    assert written["environment"]["device"] == "cuda"
    assert written["environment"]["gpu"]["name"] == "NVIDIA Test"
    assert written["environment"]["cache_bytes"] == GPU.l2_bytes
    small, large = written["cases"]
    assert (small["clock"], large["clock"]) == ("wall", "device")
    assert small["buffer_sets"] == large["buffer_sets"] == 1
    assert small["peers"][0]["ratio"] == small["peers"][0]["wall_ratio"]
    assert large["peers"][0]["ratio"] == large["peers"][0]["device_ratio"] == pytest.approx(1.5)
    for case, elements in ((small, 32), (large, 2**28)):
        assert case["floor_bytes"] == 32 * elements
        assert case["ours"]["device_median_seconds"] == pytest.approx(2e-5)
        assert case["gigabytes_per_second"] == pytest.approx(32 * elements / 2e-5 / 1e9)
        assert case["share_of_copy"] == pytest.approx(
            case["gigabytes_per_second"] / (2 * 4 * 2**10 / 1e-6 / 1e9)
        )
        assert case["unavailable"] == ["RuntimeError: `fused=True` is not supported here"]
    assert written["copy_bandwidth"]["mul_gigabytes_per_second"] is None
    assert [entry["case"] for entry in written["skipped"]] == ["adamw/one_2e50"]
    assert [entry["peer"] for entry in written["targets"]] == [
        target.peer for target in targets.CUDA_TARGETS
    ]
    for expected in (
        "steadygrad beside torch, NVIDIA Test",
        "small, wall",
        "NVIDIA Test, sm_90, L2 0 MiB, driver 580.1",
        "skipped adamw/one_2e50: needs",
        "peer missing in adamw/small: RuntimeError",
    ):
        assert expected in text


def test_a_limit_leaves_later_cases_out(tmp_path: Path) -> None:
    times = iter([0.0, 5.0, 11.0])
    _, written = scripted_run(tmp_path, limit=10.0, clock=lambda: next(times))
    assert [case["key"] for case in written["cases"]] == ["adamw/small"]
    reasons = {entry["case"]: entry["reason"] for entry in written["skipped"]}
    assert reasons["adamw/one_2e28"] == "the limit of 10 s was reached"


def test_a_rehearsal_judges_nothing() -> None:
    device = FakeDevice([])
    result = measure.CaseResult(
        cases.ModelCase(cases.OPERATIONS["adamw"], shapes.many_small()),
        Timing("steadygrad", (1.0,), (1.0,), (1.0,)),
        (measure.PeerResult(Timing(peers.CLIP_FUSED, (9.0,)), 9.0, 9.0, (9.0, 9.0)),),
        measure.CopyBandwidth(1.0),
    )
    bandwidth = measure.CopyBandwidth(1.0)
    run = report.Run(device.environment, False, bandwidth, 1, (result,), rehearsal=False)
    assert True in {verdict.met for verdict in run.verdicts}
    run = report.Run(device.environment, False, bandwidth, 1, (result,), rehearsal=True)
    assert {verdict.met for verdict in run.verdicts} == {None}
    assert "rehearsal" in str(report.render(run)[0])
    assert not any("Floors" in str(part) for part in report.render(run))
    assert "Floors" in str(report.render(run, with_targets=True)[-1])


def test_small_sets_of_buffers_rotate_past_the_cache() -> None:
    device = FakeDevice([])
    clip = cases.OPERATIONS["clip_active"]
    few = shapes.ModelShapes("few", "few", ((2**9,),))
    assert device.ground.sets(cases.ModelCase(clip, few)) == 4 * GPU.l2_bytes // (4 * 2**9)
    assert device.ground.sets(cases.ModelCase(clip, few, host_cost=True)) == 1
    assert device.ground.sets(cases.ModelCase(clip, shapes.one_tensor(28))) == 1


def test_large_cases_are_judged_by_the_gpus_clock() -> None:
    plan = [case for case in cases.CUDA_CASES if isinstance(case, cases.ModelCase)]
    clocks = {case.model.key: case.clock for case in plan}
    assert clocks == {"resnet50": "wall", "small": "wall", "gpt2": "device", "one_2e28": "device"}


def test_a_device_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    info: dict[str, Any] = {}
    monkeypatch.setattr(environment, "cuda_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(bench.DeviceUnusable, match="--device cuda: steadygrad was built without"):
        bench_device.device_named("cuda")
    info.update(architectures="sm_80", devices=[{"usable": False}], problem="no NVIDIA driver")
    assert bench_device.cuda_problem() == "no NVIDIA driver"
    info["problem"] = ""
    assert "is it a build for the CPU?" in bench_device.cuda_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert bench_device.cuda_problem().startswith("the kernels were compiled for sm_80")
    info["devices"][0]["usable"] = True
    assert bench_device.cuda_problem() == ""
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        bench_device.device_named("tpu")


# --- which source was measured ---


def commit(folder: Path) -> None:
    for arguments in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "x"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def names(folder: Path) -> list[str]:
    """The commit, and its tree of kernels."""
    command = ["git", "rev-parse", "HEAD", "HEAD:csrc"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "csrc" / "core").mkdir(parents=True)
    (folder / "csrc" / "core" / "norm.h").write_text("int norm;\n")
    # A folder sorts behind a file whose name it starts, as "core." < "core/".
    (folder / "csrc" / "core.h").write_text("int core;\n")
    (folder / "csrc" / "run").write_text("#!/bin/sh\n")
    (folder / "csrc" / "run").chmod(0o755)
    (folder / "pyproject.toml").write_text('[project]\nname = "steadygrad"\n')
    return folder


def test_the_source_is_named_as_git_names_it(checkout: Path) -> None:
    commit(checkout)
    revision, tree = names(checkout)
    found = source.this_source(checkout / "csrc" / "core")
    assert found == source.Source(revision, tree, "committed")
    (checkout / "csrc" / "core" / "norm.h").write_text("int changed;\n")
    changed = source.this_source(checkout)
    assert changed.revision == f"{revision}-dirty"
    assert changed.csrc_state == "uncommitted changes"
    commit(checkout)
    assert changed.csrc_tree == names(checkout)[1]


def test_a_source_without_history_says_what_it_can(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(source.REVISION_VARIABLE, raising=False)
    found = source.this_source(checkout)
    assert (found.revision, found.csrc_state) == ("unknown", "unknown")
    assert found.csrc_tree == source.tree_name(checkout / "csrc") != "unknown"
    monkeypatch.setenv(source.REVISION_VARIABLE, "abc")
    assert source.this_source(checkout).revision == "abc"
    # Inside somebody else's repository: its commit is not ours.
    commit(tmp_path)
    assert source.this_source(checkout).revision == "abc"


def test_outside_a_checkout_the_packages_build_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = {"revision": "1234", "csrc_tree": "5678"}
    monkeypatch.setattr(source.sg._kernels, "build_info", lambda: info)
    assert source.this_source(tmp_path) == source.Source("1234", "5678", "unknown")
    info.clear()
    assert source.this_source(tmp_path) == source.Source("unknown", "unknown", "unknown")
