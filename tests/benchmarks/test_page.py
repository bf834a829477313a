"""The page of a benchmark: from the results that are committed, and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.page import document, read_result, write_page
from tests.study.pages_read_back import drawings, parsed, tables, text_of

RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def result() -> dict[str, Any]:
    return read_result(RESULTS[0])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_page_of_a_committed_result(path: Path, tmp_path: Path) -> None:
    result = read_result(path)
    write_page(result, tmp_path / "bench.html")
    page = parsed((tmp_path / "bench.html").read_text(encoding="utf-8"))
    text = text_of(page)
    environment = result["environment"]
    assert environment["cpu"] in text and environment["torch"] in text
    assert result["created"] in text
    titles = {text_of(svg.find("title")) for svg in drawings(page)}  # type: ignore[arg-type]
    operations = {case["operation"] for case in result["cases"]}
    assert titles == operations
    pairs = [(case, peer) for case in result["cases"] for peer in case["peers"]]
    bars = [e for e in page.iter("rect") if e.attrib["class"] in ("bar solid", "bar hatched")]
    shares = [c for c in result["cases"] if c["cold_buffers"] and c["share_of_copy"] is not None]
    assert len(bars) == len(pairs) + len(shares)
    assert sum(e.attrib["class"] == "bar hatched" for e in bars) == sum(
        peer["ratio"] < 1 for _, peer in pairs
    )
    rows = [row for table in tables(page) for row in table]
    for case, peer in pairs:
        assert any(peer["name"] in row and f"{peer['ratio']:.2f}" in row for row in rows), case


def test_bars_of_ratios_start_at_1_on_one_scale(result: dict[str, Any]) -> None:
    page = parsed(document(result).html())
    by_width = {}
    for svg in drawings(page):
        for mark in svg.iter("line"):
            if mark.attrib["class"] == "mark solid":
                rects = [r for r in svg.iter("rect") if r.attrib["class"] == "bar solid"]
                assert all(float(r.attrib["x"]) >= float(mark.attrib["x1"]) - 0.11 for r in rects)
                by_width[text_of(svg.find("title"))] = len(rects)  # type: ignore[arg-type]
    assert by_width["clip_grad_norm_, active"] == 4  # of five, one peer is faster


def test_results_without_summaries_shares_or_peers(result: dict[str, Any]) -> None:
    result["cases"] = result["cases"][:1]
    result["cases"][0] |= {"share_of_copy": None, "cold_buffers": False, "unavailable": ["no <x>"]}
    result |= {"targets": [], "skipped": [{"case": "a/b", "reason": "needs 9 GiB"}]}
    text = text_of(parsed(document(result).html()))
    assert "Share of copy bandwidth" not in text and "Floors" not in text
    assert "a/b: needs 9 GiB" in text and "no <x>" in text
    assert "show the cost of a call" in text


def test_what_makes_a_result_worthless_is_said_first(result: dict[str, Any]) -> None:
    result["environment"]["load"] = 1.5
    result["rehearsal"] = True
    text = text_of(parsed(document(result).html()))
    assert text.index("rehearsal with emulated") < text.index("was busy") < text.rindex("Ratios")


def test_gpu_is_described(result: dict[str, Any]) -> None:
    result["environment"]["gpu"] = {
        "name": "NVIDIA Test 9",
        "architecture": "sm_90",
        "multiprocessors": 132,
        "driver": "580.1",
        "torch_cuda": "13.0",
        "kernels_runtime": "12.8",
        "nvcc": "12.8.93",
    }
    text = text_of(parsed(document(result).html()))
    assert "beside torch: NVIDIA Test 9" in text
    assert "sm_90, 132 multiprocessors, driver 580.1; CUDA: torch 13.0, kernels 12.8" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "expected JSON"),
        ("[]", "expected a result of the benchmark with schema 1 to"),
        ('{"schema": 99, "cases": []}', "got 99"),
        ('{"schema": 2}', "got 2"),
    ],
)
def test_what_is_no_result_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path, page = tmp_path / "result.json", tmp_path / "page.html"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_result(path)
    assert main(["--from", str(path), "--page", str(page)]) == 1
    said = "".join(capsys.readouterr().err.split())
    assert "".join(f"{path}: ".split()) in said
    assert not page.exists()


def test_command_line_makes_the_page_of_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "page.html"
    assert main(["--from", str(RESULTS[0]), "--page", str(page)]) == 0
    assert "Page written to" in capsys.readouterr().out
    assert parsed(page.read_text(encoding="utf-8")).tag == "html"


def test_page_says_how_the_run_was_started(result: dict[str, Any]) -> None:
    assert "Command not recorded" in text_of(parsed(document(result).html()))
    result["command_line"] = ["/a/python", "-m", "steadygrad", "bench"]
    assert "Command python -m benchmarks" in text_of(parsed(document(result).html()))
