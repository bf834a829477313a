"""Tests benchmarks/gpu.py: the stages of its calls, and that no stage can lose another's result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.cases import CASES

ROOT = Path(__file__).resolve().parents[2]


def stage(name: str, code: str, limit: float = 20.0, **options: Any) -> gpu.Stage:
    return gpu.Stage(name, (sys.executable, "-c", code), limit, "log", **options)


def run(entry: gpu.Stage, out: Path, seconds: float, said: list[str] | None = None) -> gpu.Outcome:
    return gpu.run_stage(entry, out, seconds, (said if said is not None else []).append)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(gpu, "CARRIED", tmp_path / "carry")
    (tmp_path / "carry").mkdir()
    file = tmp_path / "carry" / "steadygrad-0.1.0-cp312-cp312-linux_x86_64.whl"
    file.touch()
    return file


@pytest.mark.usefixtures("wheel")
def test_each_call_keeps_its_limit_with_a_wheel_and_without(tmp_path: Path) -> None:
    with_wheel = gpu.plan("python", tmp_path)
    gpu.CARRIED = tmp_path / "nothing"
    for calls in (with_wheel, gpu.plan("python", tmp_path)):
        for call, stages in calls.items():
            assert sum(entry.limit for entry in stages) <= gpu.LIMITS[call]
            assert {entry.log for entry in stages} <= set(gpu.LOGS[call])
    assert max(map(len, gpu.LOGS.values())) <= 8
    (tests,) = (entry for entry in with_wheel["correctness"] if entry.name == "tests")
    assert tests.limit == 120 and "-n 8" in " ".join(tests.command)


def test_the_plan_has_every_check(tmp_path: Path) -> None:
    stages = gpu.plan("python", tmp_path)
    assert [entry.name for entry in stages["correctness"]] == [
        "build", "doctor", "machine", "memcheck", "tests", "racecheck", "initcheck",
    ]  # fmt: skip
    assert [entry.name for entry in stages["figures"]] == ["build", "benchmark", "profile"]
    commands = {s.name: " ".join(s.command) for call in stages.values() for s in call}
    assert "--no-deps --no-index" in commands["build"]
    assert "-m gpu and not (ranks or compile or integration or slow)" in commands["tests"]
    assert "--hypothesis-profile gpu" in commands["tests"]
    assert "-m benchmarks --device cuda" in commands["benchmark"]
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"--tool {tool} --error-exitcode" in commands[tool]
    sanitized = [entry for entry in stages["correctness"] if entry.name.endswith("check")]
    assert all(s.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for s in sanitized)


def test_the_profiler_looks_at_every_kernel_that_there_is(tmp_path: Path) -> None:
    sources = [*(ROOT / "csrc" / "cuda").rglob("*.cu"), *(ROOT / "csrc" / "cuda").rglob("*.h")]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    found = [text.partition("__global__")[0] for text in texts if "__global__" in text]
    assert len(found) >= 10
    assert all(re.search(r"^namespace steadygrad\b", before, re.MULTILINE) for before in found)
    profile = gpu.plan("python", tmp_path)["figures"][-1]
    assert "--kernel-name-base demangled --kernel-name regex:steadygrad" in " ".join(
        profile.command
    )


def test_a_carried_wheel_comes_before_a_build(wheel: Path) -> None:
    carried, build = gpu._installs("python", 75)
    assert build.unless == carried.name and str(wheel) in carried.command[-1]
    assert carried.limit + build.limit == 75


def test_a_wheel_that_does_not_load_is_built_anew(tmp_path: Path) -> None:
    built = stage("build", "", unless="carried wheel")
    for code, verdicts in (
        ("", ["ok", "not needed: carried wheel"]),
        ("raise SystemExit(1)", ["exit status 1", "ok"]),
    ):
        carried = stage("carried wheel", code, optional=True)
        outcomes = gpu.run_all([carried, built], tmp_path, lambda text: None)
        assert [outcome.verdict for outcome in outcomes] == verdicts
        assert not any(outcome.failed for outcome in outcomes)


def test_a_rehearsal_touches_no_gpu_and_no_results(tmp_path: Path) -> None:
    for call, stages in gpu.plan("python", tmp_path, rehearse=True).items():
        for entry in stages:
            assert "cuda" not in " ".join(entry.command)
            assert not any(str(gpu.RESULTS) in argument for argument in entry.command)
            assert entry.log in gpu.LOGS[call]


def test_dry_mode_lists_the_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert gpu.main(["--dry", "--out", str(out)]) == 0
    assert gpu.main(["--dry", "--rehearse", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for calls in (gpu.plan(sys.executable, out), gpu.plan(sys.executable, out, True)):
        for entry in (*calls["correctness"], *calls["figures"]):
            assert f"{entry.name}, {entry.limit:.0f} s" in text
    assert "correctness: 330 s at most" in text and "figures: 240 s at most" in text
    assert not out.exists()
    assert gpu.main(["figures", "--dry", "--out", str(out)]) == 0
    assert "correctness" not in capsys.readouterr().out


def test_later_stages_run_after_one_that_failed(tmp_path: Path) -> None:
    said: list[str] = []
    stages = [
        stage("bad", "print('the reason'); raise SystemExit(3)"),
        gpu.Stage("lacking", ("no-such-program",), 20.0, "log"),
        stage("left out", "import no_such_module", optional=True),
        stage("good", "print('fine')"),
    ]
    outcomes = gpu.run_all(stages, tmp_path, said.append)
    assert [outcome.verdict for outcome in outcomes] == [
        "exit status 3", "no-such-program not found", "exit status 1", "ok",
    ]  # fmt: skip
    assert [outcome.failed for outcome in outcomes] == [True, True, False, False]
    log = (tmp_path / "log").read_text()
    assert "== bad: " in log and "the reason" in log and "fine" in log
    assert any("    the reason" in line for line in said)
    assert any("No module named 'no_such_module'" in line for line in said)


def test_failures_are_said_while_the_stage_runs(tmp_path: Path) -> None:
    said: list[tuple[float, str]] = []
    lines = ["[gw1] [ 50%] FAILED tests/clip/test_clip.py::test_x[cuda]", "WRONG clip, float32: 2"]
    lines += ["========= Invalid __global__ read of size 4", "========= ERROR SUMMARY: 0 errors"]
    code = f"import time\nfor line in {lines}: print(line)\ntime.sleep(1)"

    def say(text: str) -> None:
        said.append((time.monotonic(), text.strip()))

    assert gpu.run_stage(stage("tests", code), tmp_path, 20.0, say).verdict == "ok"
    assert [text for _, text in said] == lines[:3]
    assert all(time.monotonic() - moment > 0.8 for moment, _ in said)


def test_a_hanging_a_failing_and_a_killed_stage_lose_no_others_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that results remain when the benchmark is killed and other stages hang, crash or fail."""
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    numbers = tmp_path / "benchmark.json"
    benchmark = f"""
import os, signal
from benchmarks import __main__, measure
device = measure.HostDevice
device.plan = [case for case in measure.CASES if case.key == "adamw/policy"] * 2
device.efforts = ((0.0, 1, 1),) * 2
measure._SMALLEST_BUFFER = 2**16
contest = measure.contest
def killed_at_the_second(*arguments):
    if os.path.exists({str(numbers)!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    return contest(*arguments)
measure.contest = killed_at_the_second
__main__.main(["--threads", "1", "--out", {str(numbers)!r}])
"""
    deaf = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("before", flush=True)
time.sleep(60)
"""
    stages = [
        stage("good", "print('the first')", 1.0),
        stage("hangs", deaf, 2.0),
        stage("crashes", "import os; os.abort()"),
        stage("fails", "print('WRONG 1 + 1'); raise SystemExit(1)"),
        stage("benchmark", benchmark, 100.0),
        stage("last", "print('the last')"),
    ]
    monkeypatch.setitem(gpu.LOGS, "correctness", ("log", "correctness.txt"))
    assert gpu.run_call("correctness", stages, tmp_path) == 4
    summary = (tmp_path / "correctness.txt").read_text()
    for expected in (
        r"good: .* ok", r"hangs: .* stopped after \d s, killed", r"crashes: .* exit status -6",
        r"fails: .* exit status 1", r"benchmark: .* exit status -9", r"last: .* ok",
        r"    WRONG 1 \+ 1", r"4 of 6 stages failed",
    ):  # fmt: skip
        assert re.search(expected, summary), expected
    log = (tmp_path / "log").read_text()
    for text in ("the first", "before", "WRONG 1 + 1", "the last"):
        assert text in log
    found = json.loads(numbers.read_text())
    assert [case["key"] for case in found["cases"]] == ["adamw/policy"]
    assert found["environment"]["revision"] and found["environment"]["csrc_tree"]


def test_a_stage_ends_at_its_limit_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    mark = tmp_path / "mark"
    grandchild = f"""
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(3)
open({str(mark)!r}, 'w')
"""
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    start = time.monotonic()
    outcome = run(stage("slow", code), tmp_path, 1.0)
    assert outcome.verdict.startswith("stopped after 1 s") and outcome.failed
    assert time.monotonic() - start < 2.5
    time.sleep(start + 3.8 - time.monotonic())
    assert not mark.exists()


def test_a_stage_is_asked_to_end_before_it_is_killed(tmp_path: Path) -> None:
    # Tests that run in the background ignore SIGINT, and their children inherit that.
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("began", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("what I have")
"""
    outcome = run(stage("asked", code), tmp_path, 1.0)
    assert outcome.verdict == "stopped after 1 s"
    assert "began\nwhat I have" in (tmp_path / "log").read_text()


def test_time_left_over_goes_to_later_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, given = 0.0, []

    def runner(entry: gpu.Stage, out: Path, seconds: float, say: Any) -> gpu.Outcome:
        nonlocal now
        given.append(seconds)
        now += {"quick": 5.0, "slow": 55.0}.get(entry.name, 0.0)
        return gpu.Outcome(entry, "ok", 0.0)

    stages = [stage(name, "", limit=30.0) for name in ("quick", "slow", "last")]
    monkeypatch.setattr(gpu, "run_stage", runner)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    gpu.run_all(stages, tmp_path, lambda text: None)
    assert given == [30.0, 55.0, 30.0]


def test_a_stage_is_shielded_from_pips_constraints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_BUILD_CONSTRAINT", "constraints.txt")
    code = "import os; print({name: os.environ.get(name) for name in ('PIP_BUILD_CONSTRAINT', 'EXTRA')})"
    outcome = run(stage("look", code, environment={"EXTRA": "1"}), tmp_path, 20.0)
    assert outcome.verdict == "ok"
    assert "{'PIP_BUILD_CONSTRAINT': None, 'EXTRA': '1'}" in (tmp_path / "log").read_text()


def test_only_measurements_are_kept(tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert gpu.keep_result(tmp_path, results) is None
    found = {
        "created": "2026-01-02T03:04:05+00:00",
        "rehearsal": True,
        "environment": {"gpu": {"name": "NVIDIA H200"}},
    }
    file = tmp_path / "benchmark.json"
    file.write_text(json.dumps(found))
    assert gpu.keep_result(tmp_path, results) is None
    file.write_text(json.dumps({**found, "rehearsal": False}))
    kept = gpu.keep_result(tmp_path, results)
    assert kept == results / "nvidia-h200-2026-01-02.json"
    assert json.loads(kept.read_text())["rehearsal"] is False
    file.write_text(json.dumps({**found, "rehearsal": False, "environment": {"gpu": None}}))
    assert gpu.keep_result(tmp_path, results) is None


def test_a_rehearsal_is_marked(tmp_path: Path) -> None:
    pytest.importorskip("steadygrad_emulated", reason="the emulated kernels are not installed")
    out = tmp_path / "rehearsal.json"
    code = f"""
from benchmarks import __main__, rehearsal
chosen = ("clip_active/small", "adamw/gpt2", "batch_norm_add_relu/256x2048x7x7_fp16_nhwc")
rehearsal.CUDA_CASES = [case for case in rehearsal.CUDA_CASES if case.key in chosen]
assert len(rehearsal.CUDA_CASES) == len(chosen)
assert __main__.main(["--device", "emulated", "--out", {str(out)!r}]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rehearsal with emulated kernels: no time here means" in done.stdout
    found = json.loads(out.read_text())
    assert found["rehearsal"] is True
    assert found["environment"]["gpu"]["name"] == "emulated"
    keys = {case["key"].partition("/")[0] for case in found["cases"]}
    assert keys == {"clip_active", "adamw", "batch_norm_add_relu"}
    assert {entry["met"] for entry in found["targets"]} == {None}


def test_pytest_benchmark_has_a_test_for_each_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "benchmarks", "-k", "adamw"], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    for case in CASES:
        assert (f"test_speed[{case.key}]" in done.stdout) == ("adamw" in case.key), done.stdout
