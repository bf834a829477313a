"""Tests the command line of the study."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from study import Selection, Settings
from study import __main__ as program
from study.__main__ import main
from tests.command_lines import run_to_exit


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the terminal wide and without colours, so that lines can be compared."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def test_help(capsys: Any) -> None:
    code, text = run_to_exit(main, capsys, "--help")
    assert code == 0 and text.startswith("usage: study ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quick", "--full"], "--full: not allowed with argument --quick"),
        (["--quick", "digits"], "is an experiment of its own"),
        (["--jobs", "0"], "expected a whole number of at least 1, got '0'"),
        (["--limit", "soon"], "expected a number of seconds above 0, got 'soon'"),
        (["--quick", "--out"], "expected one argument"),
    ],
)
def test_bad_arguments_are_code_2(capsys: Any, argv: list[str], message: str) -> None:
    code, text = run_to_exit(main, capsys, *argv)
    assert code == 2
    assert message in text


def test_out_that_cannot_be_written_is_refused_first(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        code, text = run_to_exit(main, capsys, "--quick", "--out", str(out))
        assert code == 2
        assert f"--out {out}: " in text and "name " in text


@pytest.mark.parametrize("code", [0, 1])
def test_study_is_wired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    calls = []

    def run_study(selection: Any, settings: Any, console: Any) -> int:
        calls.append((selection, settings))
        return code

    monkeypatch.setattr(program, "run_study", run_study)
    monkeypatch.chdir(tmp_path)
    assert main(["--quick", "--out", "a/b", "--threads", "2"]) == code
    options = ["--jobs", "3", "--limit", "9", "--seeds", "2", "--arms", "x, y", "--data", "d"]
    assert main(["digits", "mine.py", "--full", "--restart", *options]) == code
    assert main([]) == code
    selections, settings = zip(*calls, strict=True)
    assert selections == (
        Selection(mode="quick"),
        Selection(("digits", "mine.py"), "full", 2, ("x", "y"), "d"),
        Selection(),
    )
    assert settings == (
        Settings(Path("a/b"), threads=2),
        Settings(Path("out"), jobs=3, limit_s=9.0, restart=True),
        Settings(Path("out")),
    )
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "out").is_dir()


def test_interrupt_is_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    def run_study(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run_study", run_study)
    assert main(["--out", str(tmp_path)]) == 130
    assert "Interrupted" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    command = [sys.executable, "-m", "study", "--list"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "standard output" in result.stderr
