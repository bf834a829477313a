"""Write a study as a JSON file: its declaration, every run, and what the words mean."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steadygrad.doctor import cpu_name, installed_version

from .experiment import Experiment, RunKey
from .explosion import DEFINITION
from .tasks import Task

NAME = "study.json"
SCHEMA = 3  # schema 2 also held rows and sentences that follow from the runs
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


def encode(value: Any) -> Any:
    """Return ``value`` in JSON types: dataclasses as objects, non-finite numbers as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def describe(
    experiment: Experiment,
    tasks: Mapping[str, Task],
    runs: Sequence[Mapping[str, Any]],
    curves: int = 3,
) -> dict[str, Any]:
    """Return an experiment and its runs, encoded by :func:`encode`, as JSON values.

    Only the first ``curves`` seeds keep their curves, since all curves would make the file large.
    For the same reason only arms that are compared with torch's keep their first losses.
    """
    described = experiment.describe()
    for problem, stored in zip(experiment.problems, described["problems"], strict=True):
        task = tasks[problem.name]
        model = problem.model.build(task.inputs, task.outputs, torch.Generator().manual_seed(0))
        stored["data"] = task.name
        stored["metric"] = dataclasses.asdict(task.metric)
        stored["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    compared = {name for arm in experiment.arms if arm.twin for name in (arm.name, arm.twin)}
    found = {tuple(run[name] for name in RunKey._fields): dict(run) for run in runs}
    kept = [found[key] for key in experiment.plan() if key in found]
    for run in kept:
        if run["seed"] not in experiment.seeds[:curves]:
            run["curve"] = None
        if run["arm"] not in compared:
            run["first_losses"] = []
    value: dict[str, Any] = encode({**described, "runs": kept})
    return value


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    found = {package: installed_version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    """Return a description of the machine that the study ran on."""
    cores = os.cpu_count() or 0
    return {"system": platform.platform(), "processor": cpu_name(), "cores": cores}


def without_folders(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, with only the last part of each absolute path."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


def write(document: Mapping[str, Any], path: Path) -> None:
    """Write a record, whole or not at all."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    # One run per line keeps the file small, and a diff still shows what changed.
    write_text(text.replace('},{"problem"', '},\n{"problem"') + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("x", encoding="utf-8") as file:  # mode "x" follows no link
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the records of studies; see :func:`read_json` for errors."""
    expected = f"a study of schema {SCHEMA} or 2"
    return [read_json(path, expected, (2, SCHEMA), "experiments") for path in paths]


def read_json(path: Path, expected: str, schemas: Sequence[int], key: str) -> dict[str, Any]:
    """Read a file that is ``expected`` to have one of the schemas, and ``key``.

    Raises:
        ValueError: The file cannot be read, or is something else; the message names it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema not in schemas or key not in found:
        raise ValueError(f"{path}: expected {expected}, got {schema!r}")
    return dict(found)
