"""benchmarks/gpu.py: which stages it has, and that each gets its time whatever the others do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]

NINE_MINUTES = 540.0


def stage(name: str, code: str, limit: float = 20.0, **options: Any) -> Any:
    return gpu.Stage(name, (sys.executable, "-c", code), limit, "log", **options)


def test_the_plan_fits_in_nine_minutes_and_in_few_files(tmp_path: Path) -> None:
    stages = gpu.plan("python", tmp_path)
    assert sum(stage.limit for stage in stages) < NINE_MINUTES
    assert len({stage.log for stage in stages}) <= 4


def test_the_plan_has_every_check(tmp_path: Path) -> None:
    commands = {stage.name: " ".join(stage.command) for stage in gpu.plan("python", tmp_path)}
    assert list(commands) == [
        "build", "doctor", "tests on the GPU", "memcheck", "racecheck", "initcheck",
        "benchmark", "profile", "other tests",
    ]  # fmt: skip
    assert "--no-build-isolation --no-deps --no-index" in commands["build"]
    assert commands["tests on the GPU"].endswith("-m gpu")
    assert "-m benchmarks --device cuda" in commands["benchmark"]
    assert "batch_norm" in commands["profile"]
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"--tool {tool} --error-exitcode" in commands[tool]
    sanitized = [stage for stage in gpu.plan("python", tmp_path) if "check" in stage.name]
    assert all(s.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for s in sanitized)


def test_tests_are_left_out_that_lack_a_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    intact = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "mlxtend" else intact(name)
    )
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    studies = sorted(path.name for path in (ROOT / "tests" / "study").glob("test_*.py"))
    assert len(studies) > 5
    for name in studies:
        assert f"tests/study/{name} is left out: a package that it needs is missing" in text
        assert text.count(f"--ignore=tests/{name} ") == 2


def test_a_table_of_tests_that_names_a_file_no_more_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in gpu.TESTS_THAT_NEED:
        assert all((gpu.ROOT / path).is_file() for path in gpu._test_files(package))
    monkeypatch.setitem(gpu.TESTS_THAT_NEED, "mlxtend", ("tests/test_gone.py",))
    with pytest.raises(FileNotFoundError, match=r"mlxtend.*no file fits tests/test_gone\.py"):
        gpu._test_files("mlxtend")


def test_a_rehearsal_touches_no_gpu_and_no_results(tmp_path: Path) -> None:
    for entry in gpu.rehearsal("python", tmp_path):
        assert "cuda" not in " ".join(entry.command)
        assert not any(str(gpu.RESULTS) in argument for argument in entry.command)


def test_dry_mode_lists_the_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert gpu.main(["--dry", "--out", str(out)]) == 0
    assert gpu.main(["--dry", "--rehearse", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for entry in (*gpu.plan(sys.executable, out), *gpu.rehearsal(sys.executable, out)):
        assert f"{entry.name}, {entry.limit:.0f} s" in text
    assert "535 s at most" in text
    assert not out.exists()


def test_later_stages_run_after_one_that_failed(tmp_path: Path) -> None:
    said: list[str] = []
    stages = [
        stage("bad", "print('the reason'); raise SystemExit(3)"),
        stage("lacking", "", tools=("no-such-program",)),
        stage("left out", "", modules=("no_such_module",), optional=True),
        stage("good", "print('fine')"),
    ]
    outcomes = gpu.run_all(stages, tmp_path, said.append)
    assert [outcome.verdict for outcome in outcomes] == [
        "exit status 3",
        "no-such-program not found",
        "left out: no_such_module not found",
        "ok",
    ]
    assert [outcome.failed for outcome in outcomes] == [True, True, False, False]
    log = (tmp_path / "log").read_text()
    assert "== bad: " in log and "the reason" in log and "fine" in log
    assert any("    the reason" in line for line in said)
    assert not any("    fine" in line for line in said)
    assert "2 of 4 stages failed" in gpu.summary(outcomes)


def test_a_stage_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    grandchild = f"import time; time.sleep(2.5); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    start = time.monotonic()
    outcome = gpu.run_stage(stage("slow", code), tmp_path, 1.0)
    assert outcome.verdict == "stopped after 1 s" and outcome.failed
    assert time.monotonic() - start < 2.5
    time.sleep(2.0)
    assert not mark.exists()


def test_time_left_over_goes_to_later_stages(tmp_path: Path) -> None:
    now, given = 0.0, []

    def runner(entry: Any, out: Path, seconds: float) -> Any:
        nonlocal now
        given.append(seconds)
        now += {"quick": 5.0, "slow": 55.0}.get(entry.name, 0.0)
        return gpu.Outcome(entry, "ok", 0.0)

    stages = [stage(name, "", limit=30.0) for name in ("quick", "slow", "last")]
    gpu.run_all(stages, tmp_path, lambda text: None, runner, lambda: now)
    assert given == [30.0, 55.0, 30.0]


def test_a_stage_is_shielded_from_pips_constraints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_BUILD_CONSTRAINT", "constraints.txt")
    code = "import os; print({name: os.environ.get(name) for name in ('PIP_BUILD_CONSTRAINT', 'EXTRA')})"
    outcome = gpu.run_stage(stage("look", code, environment={"EXTRA": "1"}), tmp_path, 20.0)
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


def test_a_rehearsal_is_marked_and_kept_from_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("steadygrad_emulated", reason="the emulated kernels are not installed")
    out = tmp_path / "rehearsal.json"
    code = f"""
import sys
from benchmarks import rehearsal
chosen = ("clip_active/small", "adamw/gpt2", "batch_norm_add_relu/256x2048x7x7_fp16_nhwc")
rehearsal.CUDA_CASES = [case for case in rehearsal.CUDA_CASES if case.key in chosen]
assert len(rehearsal.CUDA_CASES) == len(chosen)
assert rehearsal.main(["--out", {str(out)!r}]) == 0
rehearsal.main(["--out", {str(gpu.RESULTS / "x.json")!r}])
"""
    monkeypatch.setenv("COLUMNS", "140")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "a rehearsal has no place among the results" in done.stderr
    assert not (gpu.RESULTS / "x.json").exists()
    assert "rehearsal with emulated kernels: no time here means anything" in done.stdout
    found = json.loads(out.read_text())
    assert found["rehearsal"] is True
    assert found["environment"]["gpu"]["name"] == "emulated"
    keys = [case["key"].partition("/")[0] for case in found["cases"]]
    assert keys == ["clip_active", "adamw", "batch_norm_add_relu"]
    assert {entry["met"] for entry in found["targets"]} == {None}
