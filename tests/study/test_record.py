"""Tests the record of a study, and the tables that are printed from it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import study
from study import Classification, record
from study.runner import print_tables
from tests.study.records import BITS, a_problem, a_study, an_arm, an_experiment
from tests.study.runs import a_run, blobs, tiny
from tests.study.runs import one_thread as one_thread


@pytest.mark.parametrize(
    ("value", "bound", "reached"),
    [(0.3, 3 * 0.1, True), (0.29, 0.3, False), (None, 0.3, False), (float("nan"), 0.3, False)],
)
def test_a_bound_is_reached(value: float | None, bound: float, reached: bool) -> None:
    assert Classification(blobs()).metric.reached(value, bound) == reached


def test_the_record_says_everything(tmp_path: Path) -> None:
    experiment, task = tiny(), Classification(blobs())
    runs = [record.encode(study.train(experiment, key, task)) for key in experiment.plan()]
    described = record.describe(experiment, {"blobs": task}, runs[::-1], curves=1)
    path = tmp_path / "study.json"
    record.write({"schema": record.SCHEMA, "experiments": [described]}, path)
    (stored,) = record.read([path])
    assert stored == json.loads(path.read_text(), parse_constant=pytest.fail)
    (one,) = stored["experiments"]
    assert [run["seed"] for run in one["runs"]] == [key.seed for key in experiment.plan()]
    assert [arm["name"] for arm in one["arms"]] == [arm.name for arm in experiment.arms]
    assert {run["seed"] for run in one["runs"] if run["curve"]} == {0}
    assert {run["arm"] for run in one["runs"] if run["first_losses"]} == {
        "clip 1",
        "clip 1 (torch)",
    }
    problem = one["problems"][0]
    assert problem["metric"]["name"] == "test accuracy" and problem["data"] == "blobs"
    assert problem["parameters"] == 16 * 12 + 12 + 4 * (12 * 12 + 12) + 12 * 4 + 4
    assert set(one["runs"][0]) == {item.name for item in dataclasses.fields(a_run())}


def test_tables_fit_a_terminal_of_80_columns() -> None:
    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float]:
        return ("lost" if arm == "none" else "learned"), 2.75 + 0.011 * seed

    arms = [an_arm("none"), an_arm("SkipSpikes + LRBackoff")]
    problem = a_problem("p", {**BITS, "name": "bits per character"})
    made: Any = an_experiment("e", arms, outcomes, problems=[problem])
    for run in made["runs"]:
        run |= {"steps": 400, "clipped_steps": 133}
    document = a_study(made) | {"definitions": record.DEFINITIONS}
    console = Console(file=io.StringIO(), width=80)
    print_tables(document, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and "title of p" in text
    assert "2.77 (2.75-2.79)" in text and "33.2 %" in text and "5/5" in text and "0/5" in text
    assert "survived: the final training loss" in text
