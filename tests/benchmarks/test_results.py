"""Tests what is made of a result file: means, verdicts on floors, tables and page."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks import batch_norm as norms
from benchmarks import candidates, cases, report, results
from benchmarks.__main__ import main
from benchmarks.case import Case
from benchmarks.report import ratio_chart, write_page
from benchmarks.results import read_result

COMMITTED = sorted(results.RESULTS.glob("*.json"))


@pytest.fixture
def result() -> dict[str, Any]:
    return read_result(COMMITTED[0])


def text_of(result: dict[str, Any], width: int = 120, targets: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width)
    report.show(console, report.render(result, targets))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def in_one_line(result: dict[str, Any]) -> str:
    return " ".join(text_of(result).split())


def measured(case: Case, **ratios: float) -> dict[str, Any]:
    side = {"median_seconds": 1.0, "round_ratio_quartiles": [1.0, 2.0]}
    return {
        "key": case.key,
        "operation": case.title,
        "shapes": case.subject,
        "bytes_per_element": case.bytes_per_element,
        "floor_bytes": case.floor_bytes,
        "averaged": case.averaged,
        "cold_buffers": not case.host_cost,
        "clock": "wall",
        "gigabytes_per_second": 50.0,
        "share_of_copy": None if case.host_cost else 0.5,
        "nanoseconds_per_tensor": 12.0,
        "ours": {**side, "name": "steadygrad"},
        "peers": [{**side, "name": name, "ratio": ratio} for name, ratio in ratios.items()],
    }


def of_fusion(case: Case, *ratios: float) -> dict[str, Any]:
    names = (norms.TORCH, norms.TORCH_IN_PLACE)
    return measured(case, **dict(zip(names, ratios, strict=False)))


def plan_of(group: str) -> list[Case]:
    return [case for case in cases.CASES if case.group == group]


def test_means_and_the_slowest_case() -> None:
    first, second = plan_of("batch_norm_relu")[:2]
    found = results.summaries([of_fusion(first, 2.0, 1.0), of_fusion(second, 8.0, 9.0)])
    by_peer = {entry["peer"]: entry for entry in found}
    assert list(by_peer) == [norms.TORCH, norms.TORCH_IN_PLACE, results.FASTEST]
    assert by_peer[norms.TORCH]["mean"] == pytest.approx(4.0)
    assert by_peer[norms.TORCH_IN_PLACE]["mean"] == pytest.approx(3.0)
    assert by_peer[results.FASTEST]["mean"] == pytest.approx(math.sqrt(8.0))
    assert by_peer[results.FASTEST]["least"] == 1.0
    assert by_peer[results.FASTEST]["least_case"] == first.key
    (only,) = results.summaries([of_fusion(plan_of("batch_norm")[0], 3.0)])
    assert (only["peer"], only["cases"], only["mean"]) == (norms.TORCH, 1, pytest.approx(3.0))
    assert results.summaries([measured(plan_of("adamw")[0], torch=3.0)]) == []


def test_the_fastest_of_torchs_is_none_of_ours() -> None:
    case = plan_of("batch_norm")[0]
    ours = {"steadygrad, one read": 0.5}
    found = results.summaries([measured(case, **{norms.CUDNN: 3.0, norms.NATIVE: 2.0}, **ours)])
    (fastest,) = [entry for entry in found if entry["peer"] == results.FASTEST]
    assert fastest["least"] == 2.0


def test_floors_of_cases() -> None:
    (case,) = [case for case in cases.CASES if case.key == "clip_active/small"]
    judged = results.judge([measured(case, **{candidates.TORCH_FOREACH: 12.0})])
    verdicts = {entry["case"]: entry for entry in judged}
    assert verdicts["clip_active/small"]["met"] is True
    assert verdicts["clip_active/resnet50"]["met"] is None


def test_floors_over_a_group_need_all_of_it() -> None:
    plan = plan_of("batch_norm_relu")

    def verdicts(*found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(entry["case"], entry["peer"]): entry for entry in results.judge(found)}

    mean = ("batch_norm_relu, geometric mean", norms.TORCH_IN_PLACE)
    slowest = ("batch_norm_relu, slowest case", results.FASTEST)
    all_of_it = [of_fusion(case, 2.0, 1.9) for case in plan]
    found = verdicts(*all_of_it)
    assert found[mean]["measured"] == pytest.approx(1.9)
    assert found[mean]["met"] is True and found[slowest]["met"] is True
    assert found["batch_norm, geometric mean", norms.TORCH]["met"] is None

    found = verdicts(*all_of_it[1:])
    assert (found[mean]["cases"], found[mean]["of"], found[mean]["met"]) == (10, 11, None)
    found = verdicts(
        of_fusion(plan[0], 2.0, 0.99), *[of_fusion(case, 2.0, 2.5) for case in plan[1:]]
    )
    assert found[mean]["met"] is True and found[slowest]["met"] is False


def test_floors_name_cases_groups_and_peers_of_the_plan() -> None:
    for plan, floors in (
        (cases.CASES, results.TARGETS),
        (cases.CUDA_CASES, results.CUDA_TARGETS),
    ):
        for name, peer, _, over in floors:
            members = [case for case in plan if name in (case.group, case.key)]
            assert len(members) > 1 if over else len(members) == 1
            if name.startswith("batch_norm"):
                on = norms.CUDA_PEERS if plan is cases.CUDA_CASES else norms.PEERS
                assert peer in {side.name for side in on} | {results.FASTEST}


def test_the_table_has_times_bytes_and_means(result: dict[str, Any]) -> None:
    found = [of_fusion(case, 2.0, 1.5) for case in plan_of("batch_norm_relu")]
    result |= {"cases": found, "summaries": results.summaries(found)}
    text = text_of(result)
    rows = [line.split() for line in text.splitlines()]
    assert ["32x64x56x56", "fp32", "NHWC", "1000", "128", "50", "50", "%"] in rows
    assert ["torch", "in-place", "1000", "1.50"] in rows
    assert ["mean", "of", "11:", "torch", "in-place", "1.50"] in rows
    assert "Floors" not in text and "Floors" in text_of(result, targets=True)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_name_or_number_is_cut_off(width: int) -> None:
    """Check a narrow window and a pipe; at 80 columns the lines of a table fit."""
    found = []
    for plan in (cases.CASES, cases.CUDA_CASES):
        found += [measured(case, **{norms.NATIVE_IN_PLACE: 4.56}) for case in plan]
    shown = {**read_result(COMMITTED[0]), "cases": found, "summaries": results.summaries(found)}
    lines = text_of(shown, width, targets=True).splitlines()
    assert max(map(len, lines)) <= max(width, 80)
    text = "\n".join(lines)
    assert "…" not in text
    for case in found:
        assert case["shapes"] in text
    assert text.count(norms.NATIVE_IN_PLACE) >= len(found)
    assert len(re.findall(r"4\.56\b", text)) >= len(found)


def test_notes_say_what_the_figures_are_of_and_what_is_missing(result: dict[str, Any]) -> None:
    result["environment"] |= {"load": 1.5, "csrc_tree": "abc", "csrc_state": "committed"}
    result["environment"]["gpu"] = {
        "name": "NVIDIA Test 9",
        "architecture": "sm_90",
        "multiprocessors": 132,
        "driver": "580.1",
        "torch_cuda": "13.0",
        "kernels_runtime": "12.8",
        "nvcc": "12.8.93",
    }
    result["cases"][0]["unavailable"] = ["RuntimeError: no <x>"]
    result["skipped"] = [{"case": "a/b", "reason": "needs 9 GiB"}]
    text = in_one_line(result)
    for expected in (
        "steadygrad beside torch, NVIDIA Test 9",
        "sm_90, 132 multiprocessors, L2 32 MiB, driver 580.1; CUDA: torch 13.0, kernels 12.8",
        "kernels abc (committed)",
        "was busy when this run began (load 1.5)",
        "skipped a/b: needs 9 GiB",
        "peer missing in clip_active/resnet50: RuntimeError: no <x>",
        "show the cost of a call",
    ):
        assert expected in text
    result["rehearsal"] = True
    assert "rehearsal with emulated kernels: no time here means anything" in in_one_line(result)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_page_of_a_committed_result(path: Path, tmp_path: Path) -> None:
    found = read_result(path)
    write_page(found, tmp_path / "new" / "bench.html")
    page = (tmp_path / "new" / "bench.html").read_text(encoding="utf-8")
    root = ElementTree.fromstring(page.replace("<!doctype html>", ""))
    text = "".join(root.itertext())
    assert found["environment"]["cpu"] in text and found["created"] in text
    for case in found["cases"]:
        assert case["operation"] in text
        for peer in case["peers"]:
            assert f"{case['shapes']}: {peer['name']}" in text
            assert f"{peer['ratio']:.2f}" in text


def test_the_chart_marks_where_a_peer_is_faster(result: dict[str, Any]) -> None:
    first = result["cases"][0]
    result["cases"] = [first, {**first, "peers": [{**first["peers"][0], "ratio": 0.5}]}]
    blue, red = "#1f77b4", "#d62728"
    drawn = ratio_chart(result)
    assert drawn.count(f"fill: {blue}") == drawn.count(f"fill: {red}") == 1
    assert ratio_chart({**result, "cases": []}).count("no case was measured") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
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
    assert f"{path}: " in capsys.readouterr().err
    assert not page.exists()
