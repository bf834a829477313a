"""Tests the command line of the benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as command_line
from benchmarks import environment, measure, results
from benchmarks.__main__ import main
from tests.command_lines import run_to_exit

COMMITTED = sorted(results.RESULTS.glob("*.json"))[0]


def test_help(capsys: Any) -> None:
    code, text = run_to_exit(main, capsys, "--help")
    assert code == 0 and text.startswith("usage: benchmarks ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threads", "0"], "expected a whole number of at least 1, got '0'"),
        (["--threads", "many"], "expected a whole number of at least 1, got 'many'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--limit", "0"], "expected a number of seconds above 0, got '0'"),
        (["--from", "a.json"], "--from makes a page of a result: add --page FILE"),
        (
            ["--from", "a.json", "--page", "a.html", "--quick", "--threads", "1"],
            "--from measures nothing: leave out --quick, --threads",
        ),
        (
            ["--device", "emulated", "--out", str(results.RESULTS / "x.json")],
            "a rehearsal must not be written to the results",
        ),
    ],
)
def test_bad_arguments_are_code_2(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code, text = run_to_exit(main, capsys, *argv)
    assert code == 2
    assert message in text


def test_out_that_cannot_be_written_is_refused_first(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for argv in (
        ["--out", str(tmp_path)],
        ["--page", str(tmp_path)],
        ["--page", str(file / "below.html")],
    ):
        code, text = run_to_exit(main, capsys, *argv)
        assert code == 2
        assert f"{argv[-2]} {argv[-1]}: " in text and "name " in text


@pytest.mark.parametrize(("reason", "code"), [("needs 9 GiB", 0), ("failed: out of luck", 1)])
def test_a_run_prints_writes_and_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, reason: str, code: int
) -> None:
    asked: dict[str, Any] = {}
    found = {**results.read_result(COMMITTED), "summaries": []}
    found["skipped"] = [{"case": "a/b", "reason": reason}]

    def measured(device: measure.HostDevice, **options: Any) -> Any:
        asked.update(options)
        assert device.environment["threads"] == torch.get_num_threads() == 2
        yield {**found, "cases": found["cases"][:1]}
        assert len(json.loads(out.read_text())["cases"]) == 1  # numbers are written as they come
        yield found

    monkeypatch.setattr(command_line, "measure_all", measured)
    out, page = tmp_path / "new" / "bench.json", tmp_path / "newer" / "bench.html"
    options = ["--quick", "--limit", "90", "--threads", "2", "--out", str(out)]
    assert main([*options, "--page", str(page), "--targets"]) == code
    assert asked["quick"] is True and asked["limit"] == 90
    assert json.loads(out.read_text()) == found
    text = capsys.readouterr().out
    for expected in (
        "clip_grad_norm_, active",
        f"skipped a/b: {reason}",
        "Floors",
        f"Written to {page}",
    ):
        assert expected in text
    assert "a/b" in page.read_text()


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(*_: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "measure", interrupted)
    assert main([]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_device_that_cannot_be_used_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(environment, "cuda_info", dict)
    assert main(["--device", "cuda"]) == 1
    assert (
        capsys.readouterr().err == "benchmarks: --device cuda: steadygrad was built without CUDA\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_standard_output_that_takes_nothing_is_said(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "benchmarks", "--from", str(COMMITTED), "--page", str(page)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr
        == "benchmarks: standard output or a file cannot be written: No space left on device\n"
    )
    assert page.exists()
