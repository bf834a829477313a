"""Tests that docs/performance.md is what the result files say, and nothing else."""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import STALENESS, performance
from benchmarks.results import RESULTS, file_name, machine_of, newest_results, read_result

ROOT = Path(__file__).resolve().parents[2]

TREE, LATER = "a" * 40, "b" * 40

HOST: dict[str, Any] = {
    "created": "2026-01-02T03:04:05+00:00",
    "environment": {
        "cpu": "Test CPU",
        "cores": 2,
        "threads": 2,
        "cache_bytes": 2**25,
        "python": "3.12.3",
        "torch": "2.11.0",
        "revision": "c" * 40,
        "csrc_tree": TREE,
        "gpu": None,
    },
    "copy_bandwidth": {
        "copy_gigabytes_per_second": 75.6,
        "mul_gigabytes_per_second": 120.4,
    },
    "cases": [
        {
            "operation": "clip + AdamW",
            "shapes": "ResNet-50",
            "bytes_per_element": 32,
            "floor_bytes": 32 * 25_557_032,
            "cold_buffers": True,
            "gigabytes_per_second": 99.9,
            "share_of_copy": 0.876,
            "clock": "wall",
            "ours": {"name": "steadygrad", "median_seconds": 0.00812},
            "peers": [{"name": "torch clip + fused", "median_seconds": 0.0101, "ratio": 1.244}],
        },
        {
            "operation": "clip + AdamW",
            "shapes": "2,000 x 32",
            "bytes_per_element": 32,
            "floor_bytes": 32 * 64_000,
            "cold_buffers": False,
            "gigabytes_per_second": 0.5,
            "share_of_copy": None,
            "clock": "wall",
            "ours": {"name": "steadygrad", "median_seconds": 0.001},
            "peers": [{"name": "torch clip + fused", "median_seconds": 0.005, "ratio": 5.0}],
        },
    ],
    "targets": [
        {"case": "adamw/resnet50", "peer": "torch clip + fused", "at_least": 1.4, "measured": 1.244, "met": False},
        {"case": "adamw/resnet50", "peer": "copy bandwidth", "at_least": 0.8, "measured": 0.876, "met": True},
        {"case": "adamw/gpt2", "peer": "torch clip + fused", "at_least": 1.2, "measured": None, "met": None},
    ],
    "skipped": [{"case": "adam/one_2e28", "reason": "the limit of 75 s was reached"}],
}  # fmt: skip


BATCH_NORMS: list[dict[str, Any]] = [
    {
        "operation": "batch norm + ReLU",
        "shapes": shapes,
        "bytes_per_element": bytes_per_element,
        "floor_bytes": moved,
        "cold_buffers": True,
        "gigabytes_per_second": 50.0,
        "share_of_copy": 0.5,
        "clock": "device",
        "ours": {"name": "steadygrad", "median_seconds": 0.002},
        "peers": [
            {"name": "torch", "median_seconds": 0.004, "ratio": 2.0},
            {"name": "torch in-place", "median_seconds": 0.003, "ratio": 1.5},
        ],
    }
    for shapes, bytes_per_element, moved in (
        ("32x64x56x56 fp32 NHWC", 20.0, 128_450_560),
        ("8x256x14x14 bf16 NCHW", 10.0, 4_014_080),
    )
]
MEAN: dict[str, Any] = {
    "title": "batch norm + ReLU",
    "peer": "torch",
    "cases": 2,
    "mean": 2.0,
    "least": 1.75,
    "least_case": "batch_norm_relu/x",
}


def on_gpu() -> dict[str, Any]:
    result = copy.deepcopy(HOST)
    result["environment"]["gpu"] = {
        "name": "NVIDIA Test 9",
        "architecture": "sm_90",
        "multiprocessors": 132,
        "driver": "580.1",
        "torch_cuda": "13.0",
        "kernels_runtime": "13.0",
        "nvcc": "13.0.88",
    }
    result["copy_bandwidth"]["mul_gigabytes_per_second"] = None
    for case in result["cases"]:
        case["ours"]["wall_median_seconds"] = 0.002
    result["cases"][0]["clock"] = "device"
    return result


def settled(text: str) -> str:
    """Return the page without the lines that the next commit may change."""
    return re.sub(rf"^{re.escape(STALENESS)}.*\n\n", "", text, flags=re.MULTILINE)


def test_the_committed_page_is_what_the_generator_writes() -> None:
    written = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    made = performance(newest_results(), None)
    assert settled(written) == made, "run: make performance"


def test_staleness_is_told_and_left_out_of_the_comparison() -> None:
    results = {"Test CPU, 2 cores": HOST}
    fresh = performance(results, TREE)
    stale = performance(results, LATER)
    line = (
        "**These figures are older than the kernels**: they were measured with `csrc` at "
        "aaaaaaaaaaaa, which is now at bbbb"
    )
    assert line in stale and line not in fresh
    assert settled(stale) == settled(fresh) == fresh
    assert fresh == performance(results, None)


@pytest.mark.parametrize("tree", [None, "unknown"])
def test_a_file_that_does_not_name_its_kernels_is_told(tree: str | None) -> None:
    result = copy.deepcopy(HOST)
    result["environment"]["csrc_tree"] = tree
    result["environment"]["revision"] = None
    text = performance({"Test": result}, LATER)
    assert "does not say which kernels it measured" in text
    assert "at revision unknown" in text


def test_a_page_without_a_gpu_says_so() -> None:
    text = performance({"Test CPU, 2 cores": HOST}, TREE)
    assert (
        "CUDA was not measured, because no GPU was at hand; the kernels have been compiled" in text
    )
    for expected in (
        "## Test CPU, 2 cores\n\n2 threads, last-level cache 32 MiB.",
        "`copy_` 76 GB/s, `mul_` 120 GB/s",
        "Floors: 1 of 3 met.",
        "| adamw/resnet50 | torch clip + fused | 1.4 x | 1.24 x | **missed** |",
        "| adamw/resnet50 | copy bandwidth | 80 % | 88 % | met |",
        "| adamw/gpt2 | torch clip + fused | 1.2 x | - | not run |",
        "| ResNet-50 | 8.12 | 818 | 100 | 88 % | torch clip + fused | 10.1 | 1.24 |",
        "| 2,000 x 32 | 1 | - | - | - | torch clip + fused | 5 | 5.00 |",
        "Not measured: adam/one_2e28 (the limit of 75 s was reached).",
    ):
        assert expected in text


def test_batch_norms_have_bytes_and_means() -> None:
    result = copy.deepcopy(HOST)
    result["cases"] += BATCH_NORMS
    result["summaries"] = [MEAN, {**MEAN, "peer": "torch in-place", "mean": 1.5}]
    text = performance({"Test CPU, 2 cores": result}, TREE)
    for expected in (
        "### batch norm + ReLU\n\nFloor: 10 or 20 B an element.",
        "| shapes | ours ms | MB | GB/s | of copy | against | ms | ratio |",
        "| 32x64x56x56 fp32 NHWC | 2 | 128 | 50 | 50 % | torch | 4 | 2.00 |",
        "|  |  |  |  |  | torch in-place | 3 | 1.50 |",
        "| 8x256x14x14 bf16 NCHW | 2 | 4.01 | 50 |",
        "Geometric means: 2.00 against torch over 2 cases, at least 1.75 (batch_norm_relu/x); "
        "1.50 against torch in-place over 2 cases",
    ):
        assert expected in text


def test_a_gpu_comes_first_and_marks_wall_time() -> None:
    results = {"Test CPU, 2 cores": HOST, "NVIDIA Test 9": on_gpu()}
    text = performance(results, TREE)
    assert "CUDA was not measured" not in text
    assert text.index("## NVIDIA Test 9") < text.index("## Test CPU")
    assert "sm_90, 132 multiprocessors, driver 580.1, CUDA 13.0 in torch" in text
    assert "| 2,000 x 32, wall | 1 |" in text
    assert "`copy_` 76 GB/s.\n" in text


def test_the_newest_file_of_each_machine_counts(tmp_path: Path) -> None:
    gpu, older = on_gpu(), copy.deepcopy(HOST)
    older["created"] = "2025-12-31T23:59:59+00:00"
    older["environment"]["torch"] = "2.10.0"
    rehearsal = {**on_gpu(), "created": "2027-01-01T00:00:00+00:00", "rehearsal": True}
    for number, result in enumerate((HOST, older, gpu, rehearsal)):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    found = newest_results(tmp_path)
    assert found == {"NVIDIA Test 9": gpu, "Test CPU, 2 cores": HOST}
    assert file_name(gpu) == "nvidia-test-9-2026-01-02.json"
    assert file_name(HOST) == "test-cpu-2-cores-2026-01-02.json"


def test_the_readme_quotes_the_newest_result_and_its_repetitions() -> None:
    newest = max(newest_results().values(), key=lambda result: result["created"])
    repeated = [read_result(path) for path in sorted((RESULTS / "repeated").glob("*.json"))]
    runs = [newest, *(result for result in repeated if machine_of(result) == machine_of(newest))]
    assert len(runs) == 2
    ratios: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        for case in run["cases"]:
            for peer in case["peers"]:
                ratios[case["key"], peer["name"]].append(peer["ratio"])
    rows = (
        ("`clip_grad_norm_`, limit not reached", "clip_inactive", "torch foreach"),
        ("`clip_grad_norm_`, limit reached", "clip_active", "torch foreach"),
        ("clip + AdamW", "adamw", "torch clip + fused"),
        ("clip + momentum SGD", "sgd_momentum", "torch clip + fused"),
    )
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for name, group, peer in rows:
        (line,) = (line for line in lines if line.startswith(f"| {name} |"))
        found = [ratios[f"{group}/{model}", peer] for model in ("resnet50", "gpt2", "small")]
        ends = [(f"{min(values):.1f}", f"{max(values):.1f}") for values in found]
        numbers = [low if low == high else f"{low} to {high}" for low, high in ends]
        assert [cell.strip() for cell in line.split("|")[3:-1]] == numbers
