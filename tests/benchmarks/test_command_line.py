"""The command line of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import environment
from benchmarks import run as benchmark
from benchmarks.__main__ import main


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide and without colours, so that lines can be compared."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def ends(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Run with arguments that end in the parser; return the exit code and what was printed."""
    with pytest.raises(SystemExit) as info:
        main(argv)
    captured = capsys.readouterr()
    assert isinstance(info.value.code, int)
    return info.value.code, captured.out + captured.err


def test_help(capsys: Any) -> None:
    code, text = ends(capsys, "--help")
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
    ],
)
def test_bad_arguments_are_code_2(capsys: Any, argv: list[str], message: str) -> None:
    code, text = ends(capsys, *argv)
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
        code, text = ends(capsys, *argv)
        assert code == 2
        assert f"{argv[-2]} {argv[-1]}: " in text and "name " in text


@pytest.mark.parametrize("code", [0, 1])
def test_bench_is_wired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    calls = []

    def run(console: Any, **options: Any) -> int:
        calls.append(options)
        return code

    monkeypatch.setattr(benchmark, "run", run)
    out, page = tmp_path / "new" / "bench.json", tmp_path / "newer" / "bench.html"
    assert main(["--quick", "--out", str(out), "--threads", "1"]) == code
    more = ["--limit", "90", "--page", str(page), "--targets"]
    assert main(["--device", "cuda", *more]) == code
    assert calls == [
        {"quick": True, "out": out, "page": None, "threads": 1, "device": "cpu", "limit": None}
        | {"targets": False},
        {"quick": False, "out": None, "page": page, "threads": None, "device": "cuda", "limit": 90}
        | {"targets": True},
    ]
    assert out.parent.is_dir() and page.parent.is_dir()


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(*_: Any, **options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "run", run)
    assert main([]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_bench_says_why_a_device_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(environment, "cuda_info", dict)
    assert main(["--device", "cuda"]) == 1
    assert (
        capsys.readouterr().err == "benchmarks: --device cuda: steadygrad was built without CUDA\n"
    )
