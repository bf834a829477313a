"""The study as a JSON file; docs/study-format.md has the schema."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from study.pages.document import write_text

from .conclusions import conclusions, findings
from .encoding import encode
from .experiment import Experiment, Problem
from .explosion import DEFINITION
from .summary import summarise, twins
from .tasks import Task
from .training import Run

SCHEMA = 2
_PACKAGES = ("steadygrad", "torch", "numpy", "mlxtend")

DEFINITIONS = {
    "survived": "the final training loss is finite and below the loss at the start",
    "learned": "survived, and the metric on held-out data reached the problem's bound: three times "
    "the accuracy of guessing, with fewer than 5 classes half of what is above it; fewer than 1 % of "
    "the test sequences wrong; three quarters of the bits per character that the frequencies of the "
    "characters give",
    "exploded": DEFINITION,
    "clip rate": "share of the steps at which the clip changed the gradient",
    "gradient norm": "of all parameters together, before the clip, with penalties that are part of "
    "the step",
    "steps to target": "the first of about a dozen evaluations in a run that finds the metric at its "
    "target",
    "time": "median over the steps of a run, of forward, backward and optimizer step, with several "
    "runs side by side",
    "memory": "parameters, gradients, optimizer state and what autograd keeps for backward",
    "intervals": "95 %: Student's for means over seeds, Wilson's for shares of runs",
    "torch's equivalent": "the same remedy with torch's own functions on the same weights and "
    "batches; the first difference is the largest relative one of the batch losses of the first "
    "5 steps, the ratio of times is torch's over ours",
}


@dataclass(frozen=True)
class Study:
    """Experiments that were carried out, as far as they got.

    Attributes:
        status: ``"complete"``, ``"interrupted"`` or ``"time limit"``.
        mode: ``"quick"``, ``"default"``, ``"full"`` or ``"file"``.
        started: ISO 8601, UTC.
        wall_s: seconds of training over all sessions.
        sessions: how often it was started.
        jobs: processes side by side.
        threads: of torch in each.
        experiments: their descriptions with runs, rows, twins and conclusions, see
            :func:`describe`.
    """

    status: str
    mode: str
    started: str
    wall_s: float
    sessions: int
    jobs: int
    threads: int
    experiments: tuple[dict[str, Any], ...]


def describe(
    experiment: Experiment, tasks: Mapping[str, Task], runs: Sequence[Run], curves: int = 3
) -> dict[str, Any]:
    """Return an experiment and all that follows from its runs, as JSON values.

    Args:
        experiment: the declaration.
        tasks: the task of each problem, by its name.
        runs: in any order.
        curves: how many seeds keep theirs: those of all would make the file large. For the same
            reason only arms that are compared with torch's keep their first losses.
    """
    order = {key: place for place, key in enumerate(experiment.plan())}
    runs = sorted(runs, key=lambda run: order[run.key])
    rows = summarise(sorted(runs, key=lambda run: _display(experiment, run)))
    metrics = {name: task.metric for name, task in tasks.items()}
    described = experiment.describe()
    for problem, stored in zip(experiment.problems, described["problems"], strict=True):
        task = tasks[problem.name]
        stored["data"] = task.name
        stored["metric"] = dataclasses.asdict(task.metric)
        stored["parameters"] = _parameter_count(problem, task)
    seeds = experiment.seeds[:curves]
    compared = {name for arm in experiment.arms if arm.twin for name in (arm.name, arm.twin)}
    value: dict[str, Any] = encode(
        {
            **described,
            "runs": [_kept(run, run.seed in seeds, run.arm in compared) for run in runs],
            "rows": rows,
            "twins": twins(experiment, runs),
            "conclusions": [
                {"problem": problem.name, "arm": arm, "text": text}
                for problem in experiment.problems
                for arm, text in conclusions(
                    [row for row in rows if row.problem == problem.name], metrics[problem.name]
                )
            ],
            "findings": findings(experiment, rows, metrics),
        }
    )
    return value


def _kept(run: Run, curve: bool, first_losses: bool) -> Run:
    return dataclasses.replace(
        run,
        curve=run.curve if curve else None,
        first_losses=run.first_losses if first_losses else (),
    )


def _display(experiment: Experiment, run: Run) -> tuple[int, int]:
    """Problem by problem, and in each the arms in the order of the declaration."""
    problems = [problem.name for problem in experiment.problems]
    arms = [arm.name for arm in experiment.arms]
    return problems.index(run.problem), arms.index(run.arm)


def _parameter_count(problem: Problem, task: Task) -> int:
    import torch

    model = problem.model.build(task.inputs, task.outputs, torch.Generator().manual_seed(0))
    return sum(parameter.numel() for parameter in model.parameters())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def document(study: Study) -> dict[str, Any]:
    """Return the study as JSON values."""
    return {
        "schema": SCHEMA,
        "status": study.status,
        "mode": study.mode,
        "started": study.started,
        "wall_s": study.wall_s,
        "sessions": study.sessions,
        "command_line": [_without_folder(word) for word in sys.orig_argv],
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count() or 0,
            "jobs": study.jobs,
            "threads": study.threads,
        },
        "versions": versions(),
        "definitions": DEFINITIONS,
        "experiments": list(study.experiments),
    }


def _without_folder(word: str) -> str:
    """An absolute path says nothing to others."""
    return pathlib.Path(word).name if pathlib.Path(word).is_absolute() else word


def write(document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Write a document to ``path``, whole or not at all."""
    text = json.dumps(document, indent=None, allow_nan=False, separators=(",", ":"))
    # One run or row a line: small, and a diff still shows what changed.
    text = text.replace('},{"problem"', '},\n{"problem"')
    write_text(text + "\n", path)


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
