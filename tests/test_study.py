"""The study of remedies: its data, its runs, what it concludes, and the files it leaves."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from steadygrad import study
from steadygrad.study import Arm, Curve, Dataset, Experiment, Mlp, Run
from steadygrad.study import runner as study_runner
from steadygrad.study.data import split_indices
from steadygrad.study.training import thin
from tolerances import assert_close

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return study.digits()


@pytest.fixture
def tiny(digits: Dataset) -> Experiment:
    """All remedies on a small network, for a few steps; without a remedy it explodes at 0.5."""
    return Experiment(
        name="tiny",
        title="6-layer ReLU MLP",
        data=lambda: digits,
        model=Mlp(layers=6, width=12, init_gain=3.0),
        arms=study.REMEDIES,
        learning_rates=(1e-3, 0.5),
        seeds=(0, 1),
        steps=6,
        batch_size=16,
        momentum=0.9,
        time_limit_s=60.0,
    )


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def a_run(**changes: object) -> Run:
    """Make the record of a run in which nothing special happened, with ``changes``."""
    run = Run(
        arm="none",
        learning_rate=0.01,
        seed=0,
        steps=3,
        start_loss=2.3,
        final_loss=0.5,
        peak_loss=2.4,
        nonfinite_step=None,
        test_accuracy=0.8,
        chance=0.1,
        clipped_steps=0,
        max_grad_norm=5.0,
        seconds_per_step=0.001,
        curve=Curve(step=(1, 2, 3), loss=(2.4, 1.0, 0.5), grad_norm=(5.0, 2.0, 1.0)),
    )
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


EXPLODED = a_run(
    final_loss=math.nan,
    peak_loss=math.inf,
    nonfinite_step=3,
    test_accuracy=None,
    max_grad_norm=math.inf,
    curve=Curve(
        step=(1, 2, 3), loss=(2.4, math.inf, math.nan), grad_norm=(5.0, math.inf, math.nan)
    ),
)


# --- data ---


def test_digits_have_the_promised_shapes(digits: Dataset) -> None:
    assert digits.train_inputs.shape == (4000, 784)
    assert digits.test_inputs.shape == (1000, 784)
    assert digits.train_inputs.dtype == digits.test_inputs.dtype == torch.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert torch.equal(digits.test_labels.bincount(), torch.full((10,), 100))
    assert torch.equal(digits.train_labels.bincount(), torch.full((10,), 400))
    assert digits.chance == 0.1


def test_digits_are_normalised_by_the_training_part_alone(digits: Dataset) -> None:
    assert abs(digits.train_inputs.mean().item()) < 1e-4
    assert abs(digits.train_inputs.std().item() - 1) < 1e-4
    assert digits.test_inputs.mean().item() != pytest.approx(0.0, abs=1e-4)


def test_no_test_image_is_among_the_training_images(digits: Dataset) -> None:
    train = {image.numpy().tobytes() for image in digits.train_inputs}
    assert not any(image.numpy().tobytes() in train for image in digits.test_inputs)


def test_split_is_disjoint_complete_and_fixed_by_its_seed() -> None:
    labels = torch.arange(60).remainder(3).numpy()
    train, test = split_indices(labels, 5, seed=1)
    assert sorted(train.tolist() + test.tolist()) == list(range(60))
    assert torch.equal(test, split_indices(labels, 5, seed=1)[1])
    assert not torch.equal(test, split_indices(labels, 5, seed=2)[1])


def test_split_refuses_to_take_a_whole_class() -> None:
    with pytest.raises(ValueError, match=r"split_indices: .*test_per_class=3.* got 2 of class 1"):
        split_indices(torch.tensor([0, 0, 0, 0, 1, 1]).numpy(), 3, seed=0)


# --- a run ---


def test_a_seed_fixes_a_run(tiny: Experiment, digits: Dataset) -> None:
    def run(seed: int) -> Run:
        made = study.train(tiny, tiny.arms[1], 1e-3, seed, digits)
        return dataclasses.replace(made, seconds_per_step=0.0)

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert run(0) == first
    assert run(1).curve != first.curve


def test_arms_differ_by_their_remedy_alone(tiny: Experiment, digits: Dataset) -> None:
    starts = {arm.name: study.train(tiny, arm, 1e-3, 0, digits).start_loss for arm in tiny.arms}
    he = starts.pop("He init")
    assert len(set(starts.values())) == 1
    assert he < starts["none"]


def test_without_a_remedy_it_is_plain_torch(tiny: Experiment, digits: Dataset) -> None:
    run = study.train(tiny, tiny.arms[0], 1e-4, 3, digits)
    generator = torch.Generator().manual_seed(3)
    model = tiny.model.build(784, 10, generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=tiny.momentum)
    order = torch.randperm(4000, generator=generator)
    losses = []
    for batch in order.split(tiny.batch_size)[: tiny.steps]:
        optimizer.zero_grad()
        outputs = model(digits.train_inputs[batch])
        loss = torch.nn.functional.cross_entropy(outputs, digits.train_labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_close(run.curve.loss, losses, torch.float32)


def test_an_explosion_is_seen_and_ends_the_run(tiny: Experiment, digits: Dataset) -> None:
    steps = []
    longer = dataclasses.replace(tiny, steps=50)
    run = study.train(longer, tiny.arms[0], 0.5, 0, digits, lambda step, loss: steps.append(step))
    assert run.nonfinite_step is not None
    assert run.nonfinite_step <= run.steps < 50
    assert steps == list(range(1, run.steps + 1))
    assert run.test_accuracy is None
    assert not run.survived


def test_clipping_is_counted(tiny: Experiment, digits: Dataset) -> None:
    run = study.train(tiny, Arm("clip", max_norm=1.0), 1e-3, 0, digits)
    assert run.clipped_steps == run.steps == tiny.steps
    assert run.max_grad_norm > 1.0
    assert study.train(tiny, Arm("none"), 1e-3, 0, digits).clipped_steps == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 159, 160, 161, 1500])
def test_thinning_keeps_the_ends_and_the_extremes(steps: int) -> None:
    losses = [float(step) for step in range(steps)]
    norms = [1.0] * steps
    norms[steps // 2] = 99.0
    curve = thin(losses, norms, 160)
    assert len(curve.step) == len(curve.loss) == len(curve.grad_norm) <= 160
    assert list(curve.step) == sorted(set(curve.step))
    assert (curve.step[0], curve.step[-1]) == (1, steps)
    assert (curve.loss[0], curve.loss[-1]) == (losses[0], losses[-1])
    assert max(curve.grad_norm) == 99.0


# --- what counts as survived and as learned ---


@pytest.mark.parametrize(
    ("run", "survived", "learned"),
    [
        (a_run(), True, True),
        (a_run(test_accuracy=0.3), True, True),
        (a_run(test_accuracy=0.29), True, False),
        (a_run(final_loss=2.29, test_accuracy=0.1), True, False),  # dead, at chance
        (a_run(final_loss=60.0, test_accuracy=0.1), False, False),  # saturated, never NaN
        (a_run(final_loss=60.0, test_accuracy=0.9), False, False),
        (a_run(final_loss=2.3), False, False),
        (a_run(final_loss=math.inf, test_accuracy=0.9), False, False),
        (EXPLODED, False, False),
        (a_run(start_loss=math.inf), True, True),
    ],
)
def test_survived_and_learned(run: Run, survived: bool, learned: bool) -> None:
    assert (run.survived, run.learned) == (survived, learned)


def test_rows_count_every_seed() -> None:
    runs = [
        a_run(steps=200, clipped_steps=50, test_accuracy=0.8, seconds_per_step=0.002),
        a_run(steps=200, clipped_steps=150, test_accuracy=0.6, seconds_per_step=0.004),
        EXPLODED,
        a_run(arm="clip", learning_rate=0.1),
        a_run(arm="clip", learning_rate=0.001),
    ]
    rows = study.summarise(runs)
    assert [(row.arm, row.learning_rate) for row in rows] == [
        ("none", 0.01),
        ("clip", 0.001),
        ("clip", 0.1),
    ]
    first = rows[0]
    assert (first.runs, first.survived, first.learned) == (3, 2, 2)
    assert first.accuracies == (0.6, 0.8)
    assert first.accuracy == pytest.approx(0.7)
    assert first.nonfinite_steps == (3,)
    assert first.clipped_share == pytest.approx(200 / 403)
    assert first.max_grad_norm == math.inf
    assert first.seconds_per_step == pytest.approx(0.003)
    assert rows[1].seconds_per_step is None  # three steps tell nothing


def test_conclusions_come_from_the_numbers() -> None:
    rows = study.summarise(
        [
            EXPLODED,
            a_run(learning_rate=0.1, final_loss=60.0, test_accuracy=0.1),
            a_run(arm="clip", test_accuracy=0.9),
            a_run(arm="clip", learning_rate=0.1, test_accuracy=0.1),
        ]
    )
    none, clip = (sentence for _, sentence in study.conclusions(rows))
    assert none == (
        "0 of 2 runs survived and 0 learned; "
        "at learning rate 0.01 the loss of 1 of 1 runs blew up (at step 3); "
        "at learning rate 0.1 it stayed finite but ended no lower than it began; "
        "at no learning rate did every seed learn."
    )
    assert clip == (
        "2 of 2 runs survived and 1 learned (none: 0 of 2 survived); "
        "at learning rate 0.1 it survived without learning; "
        "it learned best at 0.01, with a test accuracy of .90."
    )
    assert study.conclusions([]) == []


# --- the whole study ---


def test_study_writes_plot_json_and_report(
    tiny: Experiment, console: Console, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    assert study.carry_out(tiny, tmp_path / "out", console, threads=1) == 0
    assert torch.get_num_threads() == threads
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(PNG_SIGNATURE)
    document = json.loads((tmp_path / "out" / "study.json").read_text())
    assert document["status"] == "complete"
    assert document["machine"]["threads"] == 1
    assert document["command_line"] == list(sys.orig_argv)
    assert document["experiment"]["seeds"] == [0, 1]
    assert len(document["runs"]) == len(tiny.plan()) == 24
    assert len(document["rows"]) == 12
    text = printed(console)
    for arm in tiny.arms:
        assert f"{arm.name}: " in text
    assert max(len(line.rstrip()) for line in text.splitlines() if str(tmp_path) not in line) <= 80


def test_json_round_trip(tmp_path: Path) -> None:
    made = study.Study(
        status="time limit",
        started="2024-01-01T00:00:00+00:00",
        wall_s=1.5,
        command_line=("python", "-m", "steadygrad"),
        machine={"system": "Linux", "processor": "x", "cores": 2, "threads": 1},
        versions={"python": "3.11.0"},
        experiment={"name": "tiny", "steps": 3},
        runs=(a_run(), EXPLODED),
    )
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    study.write(made, first)
    again = study.read(first)
    study.write(again, second)
    assert first.read_text() == second.read_text()
    assert again.runs[0] == made.runs[0]
    # repr, since NaN differs from itself
    assert repr(again) == repr(made)
    stored = json.loads(first.read_text(), parse_constant=pytest.fail)["runs"]
    assert [run["survived"] for run in stored] == [True, False]
    assert stored[1]["curve"]["loss"] == [2.4, "inf", "nan"]


def test_json_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="must have schema 1, got 99"):
        study.read(path)


@pytest.mark.parametrize("finished", [0, 3])
def test_interrupt_leaves_partial_results(
    tiny: Experiment,
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: int,
) -> None:
    made: list[Run] = []

    def train_then_interrupt(*args: object) -> Run:
        if len(made) == finished:
            raise KeyboardInterrupt
        made.append(a_run(arm=tiny.arms[len(made)].name, learning_rate=1e-3))
        return made[-1]

    monkeypatch.setattr(study_runner, "train", train_then_interrupt)
    assert study.carry_out(tiny, tmp_path, console, threads=1) == 130
    assert f"Interrupted after {finished} of 24 runs: the results are partial." in printed(console)
    partial = study.read(tmp_path / "study.json")
    assert partial.status == "interrupted"
    assert partial.runs == tuple(made)
    assert (tmp_path / "study.png").exists() == bool(finished)


def test_time_limit_starts_no_more_runs(tiny: Experiment, digits: Dataset) -> None:
    partial = study.run_study(
        dataclasses.replace(tiny, time_limit_s=-1.0), digits, Console(file=io.StringIO())
    )
    assert (partial.status, partial.runs) == ("time limit", ())


@pytest.mark.parametrize("package", ["mlxtend", "matplotlib"])
def test_missing_package_is_named_before_training(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    assert study.run_quick(tmp_path / "out", console, threads=None) == 1
    message = " ".join(printed(console).split())
    expected = f"the study needs {package}, which is not installed: pip install 'steadygrad[study]'"
    assert message == expected
    assert not (tmp_path / "out").exists()


def test_threads_must_be_positive(console: Console, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_quick: threads must be at least 1, got 0"):
        study.run_quick(tmp_path, console, threads=0)


def test_quick_study_compares_the_six_remedies() -> None:
    quick = study.QUICK
    assert [arm.name for arm in quick.arms] == ["none", "clip", "L1", "L2", "clip+L2", "He init"]
    assert (quick.model.layers, quick.model.init_gain) == (20, 1.5)
    assert len(quick.seeds) == 3
    assert list(quick.learning_rates) == sorted(quick.learning_rates)
