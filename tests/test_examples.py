"""The examples, as a user starts them, and the snippets of docs/distributed.md."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ranks
from documented_snippets import snippets

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SNIPPETS_RANK = Path(__file__).with_name("documented_rank.py")
TIME_LIMIT = 120  # seconds for one set of ranks; they take about 20 alone
WAYS = {2: ["ddp", "fsdp2", "tp", "pp"], 4: ["hsdp", "fsdp2_tp"]}
ARMS = ["fp32", "bf16 naive", "bf16, fp32 state", "bf16 + Kahan", "bf16 + stochastic"]
ARMS += ["bf16 + master"]

with_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture
def threads() -> Iterator[None]:
    """As many for torch afterwards as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"distributed.py", "half_precision.py"}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.usefixtures("threads")
def test_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "3", "--seeds", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["half_precision.py", *options])
    runpy.run_path(str(EXAMPLES / "half_precision.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "out" / "half_precision.md").read_text().splitlines()
        if line.startswith("|")
    ][2:]
    assert [row[0] for row in rows] == ARMS
    assert [row[4] for row in rows] == ["12.0", "6.0", "10.0", "12.0", "10.0", "14.0"]
    for row in rows:
        assert row[0] in printed and row[2] in printed
        assert math.isfinite(float(row[1])) and 3 < float(row[2]) < 7
    runs = json.loads((tmp_path / "out" / "half_precision.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ARMS
    assert all(len(run["losses"]) == 3 for run in runs)
    assert (tmp_path / "out" / "half_precision.png").read_bytes()[:4] == b"\x89PNG"


def torchrun(world: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [f"--nproc-per-node={world}", str(EXAMPLES / "distributed.py"), *arguments]
    return subprocess.run(
        [*command, *script],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@with_gloo
@pytest.mark.parametrize("world", WAYS, ids=lambda world: f"{world} ranks")
def test_distributed(world: int) -> None:
    steps = ["--steps", "12", "--check"]
    finished = torchrun(world, "--parallel", *WAYS[world], *steps)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    for way in WAYS[world]:
        own = [line for line in lines if line.startswith(f"{way}: ")]
        assert "equal to one process" in own[-1] and f"{world} ranks" in own[-1]
        assert [line.split()[2] for line in own[:-1]] == ["0", "6", "10", "11"]
        assert [line.split()[-1] for line in own[:-1]] == ["0", "1", "1", "1"]  # skipped
    # One training, whatever the way.
    norms = {line.split()[6] for line in lines if "step   0" in line}
    assert len(norms) == 1


@with_gloo
@pytest.mark.parametrize("title", snippets())
def test_snippets_of_the_page_on_distributed_training(title: str) -> None:
    found = ranks.found(SNIPPETS_RANK, 4, TIME_LIMIT, title)
    for rank in found:
        assert rank["skipped"] == 0
        assert math.isfinite(rank["norm"]) and rank["norm"] > 0
        assert rank["norm"] == found[0]["norm"]
