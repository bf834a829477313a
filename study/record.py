"""The study as a JSON file: what was declared, every run, and what all words mean."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .experiment import Experiment
from .explosion import DEFINITION
from .tasks import Task

NAME = "study.json"
SCHEMA = 3
_SCHEMAS = (2, SCHEMA)  # 2 also had rows and sentences that follow from the runs
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
    """Return ``value`` with dataclasses as objects, tuples as lists and non-finite numbers as strings."""
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
    """Return an experiment and its runs as JSON values.

    Args:
        experiment: the declaration.
        tasks: the task of each problem, by its name.
        runs: as :func:`encode` gives them, in any order.
        curves: how many seeds keep theirs: those of all would make the file large. For the same
            reason only arms that are compared with torch's keep their first losses.
    """
    order = {tuple(key): place for place, key in enumerate(experiment.plan())}
    described = experiment.describe()
    for problem, stored in zip(experiment.problems, described["problems"], strict=True):
        task = tasks[problem.name]
        model = problem.model.build(task.inputs, task.outputs, torch.Generator().manual_seed(0))
        stored["data"] = task.name
        stored["metric"] = dataclasses.asdict(task.metric)
        stored["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    compared = {name for arm in experiment.arms if arm.twin for name in (arm.name, arm.twin)}
    kept = [
        {
            **run,
            "curve": run["curve"] if run["seed"] in experiment.seeds[:curves] else None,
            "first_losses": run["first_losses"] if run["arm"] in compared else [],
        }
        for run in runs
    ]
    kept.sort(key=lambda run: order[run["problem"], run["arm"], run["learning_rate"], run["seed"]])
    value: dict[str, Any] = encode({**described, "runs": kept})
    return value


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def machine() -> dict[str, Any]:
    """Return what the study ran on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    processor = names[0].strip() if names else platform.processor() or platform.machine()
    return {"system": platform.platform(), "processor": processor, "cores": os.cpu_count() or 0}


def command_line() -> list[str]:
    """Return the words of this process's command; an absolute path says nothing to others."""
    return [Path(word).name if Path(word).is_absolute() else word for word in sys.orig_argv]


def command_text(arguments: Sequence[str]) -> str:
    """Return a command line as one would type it; a script by its name, without its folder."""
    programs = 1 + (len(arguments) > 1 and not arguments[1].startswith("-"))
    names = [Path(argument).name for argument in arguments[:programs]]
    return shlex.join([*names, *arguments[programs:]]) or "not recorded"


def write(document: Mapping[str, Any], path: Path) -> None:
    """Write a record, whole or not at all."""
    text = json.dumps(document, indent=None, allow_nan=False, separators=(",", ":"))
    # One run a line: small, and a diff still shows what changed.
    write_text(text.replace('},{"problem"', '},\n{"problem"') + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A new file of a name that nobody can have made a link of before.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read records of studies.

    Raises:
        ValueError: a file cannot be read, or is no record of a study; the message names it.
    """
    documents = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got: {error}") from error
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema not in _SCHEMAS or "experiments" not in record:
            raise ValueError(f"{path}: expected a study of schema {SCHEMA} or 2, got {schema!r}")
        documents.append(record)
    return documents
