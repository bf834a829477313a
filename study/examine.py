"""Compare what ``steadygrad.examine`` predicts for the study's networks with what happened to them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import steadygrad as sg

from .experiment import Experiment, Problem, RunKey
from .experiments import EXPERIMENTS

# Maps each arm of the study to the trial of examine that tries the same remedy.
TRIALS = {
    "none": "as it is",
    "clip 1": "clip",
    "He init": "initialisation",
    "batch norm": "batch norm",
    "L2": "L2",
    "warmup": "warm-up",
    "accumulate 4": "accumulation",
    "tanh": "activation",
}
# The trial's thresholds were fixed on these problems.
FIXED_ON = ("digits", "10 layers", "30 layers", "CNN", "temporal order 20", "addition 20")


@dataclasses.dataclass(frozen=True)
class Foretold:
    """Pairs a recorded run with what examine predicted for it before its first step.

    Attributes:
        key: Problem, arm, learning rate and seed.
        lost: Whether the run was lost, as ``docs/study.md`` defines it.
        said: Whether examine predicted that it would be lost.
        ratio: Learning rate divided by the largest stable one.
    """

    key: RunKey
    lost: bool
    said: bool
    ratio: float


def main(argv: Sequence[str]) -> int:
    """Examine every problem of a record and print how often the prediction was right."""
    parser = argparse.ArgumentParser(prog="study examine", description=__doc__)
    parser.add_argument("record", type=Path, help="study.json of a study of these experiments")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--problem", help="examine this problem alone")
    args = parser.parse_args(argv)
    record = json.loads(args.record.read_text(encoding="utf-8"))
    torch.set_num_threads(1)  # networks this small do not gain from a second thread
    found = []
    for one in foretell(record, args.seeds, args.problem):
        found.append(one)
        words = ["lost" if verdict else "holds" for verdict in (one.said, one.lost)]
        mark = "" if one.said == one.lost else "  WRONG"
        name = (
            f"{one.key.problem}, {one.key.arm}, lr {one.key.learning_rate:g}, seed {one.key.seed}"
        )
        print(  # noqa: T201
            f"{name}: {one.ratio:.3g} x stable, said {words[0]}, {words[1]}{mark}", flush=True
        )
    for line in summary(found):
        print(line)  # noqa: T201
    return 0


def foretell(record: dict[str, Any], seeds: int, only: str | None = None) -> Iterator[Foretold]:
    """Examine the networks of a record; yield each prediction with the run that it is about.

    Args:
        record: Record of a study, as in its ``study.json``.
        seeds: Number of seeds per setting.
        only: Name of the only problem to examine. Default: None, all problems.
    """
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    for recorded in record["experiments"]:
        experiment = known[recorded["name"]]
        problems = {p.name: p for p in (*experiment.problems, *experiment.full_problems)}
        runs = {
            RunKey(run["problem"], run["arm"], run["learning_rate"], run["seed"]): run
            for run in recorded["runs"]
            if run["arm"] in TRIALS and run["seed"] < seeds and only in (None, run["problem"])
        }
        settings: dict[tuple[str, float, int], list[RunKey]] = defaultdict(list)
        for key in runs:
            settings[key.problem, key.learning_rate, key.seed].append(key)
        for keys in settings.values():
            trials = _trials(experiment, problems[keys[0].problem], keys[0])
            for key in keys:
                trial = trials.get(TRIALS[key.arm])
                if trial is not None:
                    yield Foretold(key, _is_lost(runs[key]), not trial.holds, trial.ratios[0])


def _trials(experiment: Experiment, problem: Problem, key: RunKey) -> dict[str, Any]:
    task = problem.task()
    # The seed draws first the weights and then the batches, as in a run.
    generator = torch.Generator().manual_seed(key.seed)
    model = problem.model.build(task.inputs, task.outputs, generator)
    stepper = experiment.arm("none").stepper(
        list(model.parameters()), key.learning_rate, problem.momentum
    )
    given = task.batches(problem.batch_size, generator)
    found = sg.examine(model, task.loss, given, optimizer=stepper.optimizer)
    # Where nothing stands out, examine tries no remedy, because it expects every run to survive.
    ratio = found.lr / found.largest_stable_lr
    untried = sg.examination.Trial("", True, (ratio,), 0.0, (), 0.0, 0.0)
    rest = dict.fromkeys(TRIALS.values(), untried) if len(found.trials) < 2 else {}
    return rest | {trial.remedy: trial for trial in found.trials}


def _is_lost(run: dict[str, Any]) -> bool:
    exploded = run["exploded_step"] is not None
    return not run["survived"] or (exploded and not run["learned"])


def summary(found: Sequence[Foretold]) -> list[str]:
    """Count right predictions by remedy.

    Problems on which the thresholds were fixed are counted apart from the others.
    """
    lines = []
    for arm in TRIALS:
        for among, label in ((True, "problems it was fixed on"), (False, "other problems")):
            these = [f for f in found if f.key.arm == arm and (f.key.problem in FIXED_ON) is among]
            right = sum(f.said == f.lost for f in these)
            missed = sum(f.lost and not f.said for f in these)
            false = len(these) - right - missed
            if these:
                counts = f"{right} of {len(these)} right, {missed} missed, {false} false alarms"
                lines.append(f"{arm}, {label}: {counts}")
    return lines
