"""Tests what a study refuses before it trains, and which results it does not overwrite."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import study
from study import Arm, Classification, Experiment, Problem, Selection, Settings, runner
from study import remedies as r
from study.journal import NAME
from study.record import NAME as RECORD
from study.runner import report_again
from tests.study.runs import blobs, tiny
from tests.study.runs import one_thread as one_thread


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def own(folder: Path, lines: str = "", name: str = "own") -> Selection:
    """Return a selection of a file that holds the tiny experiment, changed by ``lines``."""
    path = folder / f"{name}.py"
    path.write_text(
        "import dataclasses\nimport math\nimport study\n"
        "from tests.study.runs import blobs, tiny\n"
        f"EXPERIMENT = tiny(learning_rates=(1e-3,), seeds=(0,))\n{lines}\n"
    )
    return Selection((str(path),), arms=("clip 1",))


# --- descriptions that cannot be right ---


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "Problem blobs: steps: expected an integer of at least 1, got 0"),
        ("steps", 3.5, "Problem blobs: steps: expected an integer of at least 1, got 3.5"),
        ("batch_size", 0, "batch_size: expected an integer of at least 1"),
        ("evaluations", 0, "evaluations: expected an integer of at least 1"),
        ("momentum", -1.0, "momentum: expected at least 0 and below 1, got -1.0"),
        ("name", "two\nlines", "name: expected printable characters on one line"),
    ],
)
def test_problems_are_checked(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny().problems[0], **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rates", (-0.3,), "expected finite numbers above 0, got -0.3"),
        ("learning_rates", (float("nan"),), "expected finite numbers above 0, got nan"),
        ("learning_rates", ("0.3",), "expected finite numbers above 0, got '0.3'"),
        ("seeds", (0.5,), "seeds: expected integers of at least 0, got 0.5"),
        ("seeds", (-1,), "seeds: expected integers of at least 0, got -1"),
        ("name", "", "Experiment: name: expected printable characters"),
    ],
)
def test_experiments_are_checked(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**{field: value})


def test_arms_have_names_on_a_line() -> None:
    with pytest.raises(ValueError, match="Arm: name: expected printable characters"):
        Arm("clip\t1")


class Refuses(Classification):
    """Has a metric that is not a number."""

    def measure(self, model: Any) -> Any:
        """Return a tensor in place of a number."""
        return next(model.parameters())


def test_everything_is_built_once_before_anything_is_trained(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner._Study, "carry_out", pytest.fail)
    problem: Problem = tiny().problems[0]
    strange = dataclasses.replace(problem, task=lambda: Refuses(blobs()))
    cases: list[tuple[Experiment, str]] = [
        (tiny(arms=(r.NONE, Arm("bad", max_norm=-1.0))), "tiny, blobs, arm 'bad': ValueError"),
        (tiny(arms=(r.NONE, Arm("bad", model={"activation": "nonsense"}))), "arm 'bad': KeyError"),
        (tiny(problems=(strange,)), "arm 'none': TypeError: Refuses: expected a loss and a metric"),
    ]
    for experiment, message in cases:
        monkeypatch.setattr(Selection, "experiments", lambda self, own=experiment: [own])
        assert study.run_study(Selection(), Settings(tmp_path, jobs=1), console) == 1
        assert message in printed(console)
        assert list(tmp_path.iterdir()) == []


# --- what is there already ---


def test_results_of_another_study_are_spared(tmp_path: Path, console: Console) -> None:
    out = tmp_path / "out"
    first, other = own(tmp_path), own(tmp_path, "EXPERIMENT = tiny(name='other')", "other")
    assert study.run_study(first, Settings(out, jobs=1), console) == 0
    before = (out / RECORD).read_bytes()
    assert study.run_study(other, Settings(out, jobs=1), console) == 1
    assert "has the results of tiny; name another --out, or add --restart" in printed(console)
    assert (out / RECORD).read_bytes() == before
    # The same study may replace its results; another study needs --restart.
    assert study.run_study(first, Settings(out, jobs=1), console) == 0
    (out / "study" / "mine.svg").write_text("no picture of a study")
    assert study.run_study(other, Settings(out, jobs=1, restart=True), console) == 0
    assert sorted(path.name for path in (out / "study").iterdir()) == [
        "mine.svg",
        "other-curves.svg",
        "other-results.svg",
    ]


@pytest.mark.parametrize(
    ("lines", "other"),
    [
        ("# a remark", "files"),
        (
            "EXPERIMENT = dataclasses.replace(EXPERIMENT, problems=(dataclasses.replace("
            "EXPERIMENT.problems[0], evaluations=3),))",
            "experiments and files",
        ),
        (
            "data = dataclasses.replace(blobs(), train_inputs=2 * blobs().train_inputs)\n"
            "EXPERIMENT = dataclasses.replace(EXPERIMENT, problems=(dataclasses.replace("
            "EXPERIMENT.problems[0], task=lambda: study.Classification(data)),))",
            "files and data",
        ),
    ],
)
def test_what_has_changed_since_is_not_gone_on_with(
    lines: str, other: str, tmp_path: Path, console: Console
) -> None:
    stopped = Settings(tmp_path / "out", jobs=1, limit_s=1e-9)
    assert study.run_study(own(tmp_path), stopped, console) == 0
    assert study.run_study(own(tmp_path, lines), stopped, console) == 1
    assert f"holds an unfinished study with other {other}; go on with" in printed(console)
    assert (tmp_path / "out" / NAME).exists()


def test_arms_are_looked_for_in_all_experiments() -> None:
    chosen = Selection(arms=("clip value", "clip 5")).experiments()
    assert {e.name: [arm.name for arm in e.arms] for e in chosen} == {
        "digits": ["none", "clip value"],
        "char": ["none", "clip 5"],
        "transformer-sgd": ["none", "clip value"],
        "transformer-adamw": ["none", "clip value"],
    }


# --- texts and records that are not as they should be ---


def test_markup_in_names_is_text(tmp_path: Path, console: Console) -> None:
    lines = (
        "EXPERIMENT = dataclasses.replace(EXPERIMENT, title='[/red]', arms=(study.Arm('[bold]'),"
        " study.Arm('clip 1', max_norm=1.0)), problems=(dataclasses.replace("
        "EXPERIMENT.problems[0], name='nan', title='a [/b]'),))"
    )
    assert study.run_study(own(tmp_path, lines), Settings(tmp_path / "inf", jobs=1), console) == 0
    assert "a [/b]" in printed(console) and "nan, [bold]: " not in printed(console)
    text = (tmp_path / "inf" / "study.md").read_text()
    assert "\\[/red]" in text and "\\[bold]" in text


@pytest.mark.parametrize(
    "broken",
    [
        {"schema": 3, "experiments": []},
        {"schema": 3, "experiments": "abc", "wall_s": 1.0},
        {"schema": 3, "experiments": [{"name": "e"}], "wall_s": 1.0},
    ],
)
def test_damaged_records_are_refused(
    broken: dict[str, Any], tmp_path: Path, console: Console
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    assert report_again([path], tmp_path, console) == 1
    assert "expected whole records of studies" in printed(console)
    assert report_again([path, path], tmp_path, console) == 1
    assert "expected each file once" in printed(console)
