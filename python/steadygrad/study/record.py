"""The study as a JSON file.

Schema of ``study.json`` (``"schema": 1``):

========================  ==========================================================================
key                       value
========================  ==========================================================================
``schema``                1; goes up when a key changes its meaning or goes away
``status``                ``"complete"``, ``"interrupted"`` (Ctrl-C) or ``"time limit"``
``started``               time of the start, ISO 8601, UTC
``wall_s``                seconds from the start of training to its end
``command_line``          list of strings
``machine``               ``system``, ``processor``, ``cores``, ``threads`` (those torch used)
``versions``              package name -> version
``experiment``            ``name``, ``title``, ``data``, ``model``, ``arms``, ``learning_rates``,
                          ``seeds``, ``steps``, ``batch_size``, ``momentum``, ``time_limit_s``
``runs``                  list, in the order they were made, of the fields of ``training.Run``, with
                          ``curve`` as an object of three lists, and ``survived`` and ``learned``
``rows``                  list of the fields of ``summary.Row`` and ``accuracy``, their mean
``conclusions``           arm name -> sentence
========================  ==========================================================================

Times are in seconds, accuracies and shares between 0 and 1. JSON has no non-finite numbers: they
are the strings ``"nan"``, ``"inf"`` and ``"-inf"``. ``runs`` says everything, ``rows`` and
``conclusions`` are computed from it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch

from .experiments import Experiment
from .summary import Row, conclusions, summarise
from .training import Curve, Run

SCHEMA = 1
_PACKAGES = ("steadygrad", "torch", "numpy", "mlxtend", "matplotlib")


@dataclass(frozen=True)
class Study:
    """An experiment that was carried out, as far as it got.

    Attributes:
        status: ``"complete"``, ``"interrupted"`` or ``"time limit"``.
        started: ISO 8601, UTC.
        wall_s: duration in seconds.
        command_line: how the process was started.
        machine: what it ran on.
        versions: versions of Python and of the packages that matter.
        experiment: the description, see :func:`describe`.
        runs: in the order they were made.
    """

    status: str
    started: str
    wall_s: float
    command_line: tuple[str, ...]
    machine: dict[str, str | int]
    versions: dict[str, str]
    experiment: dict[str, Any]
    runs: tuple[Run, ...]

    def rows(self) -> list[Row]:
        """Condense the runs to a row per arm and learning rate."""
        return summarise(self.runs)


def describe(experiment: Experiment, data_name: str) -> dict[str, Any]:
    """Return the declaration of an experiment as JSON values."""
    fields = {f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment)}
    fields["data"] = data_name
    fields["model"] = {
        "kind": type(experiment.model).__name__,
        **dataclasses.asdict(experiment.model),
    }
    fields["arms"] = [dataclasses.asdict(arm) for arm in experiment.arms]
    return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}


def machine() -> dict[str, str | int]:
    """Describe the machine, and the number of threads torch uses now."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def command_line() -> tuple[str, ...]:
    """Return how the process was started."""
    return tuple(sys.orig_argv)


def write(study: Study, path: pathlib.Path) -> None:
    """Write ``study`` to ``path`` as JSON, in the schema of this module."""
    rows = study.rows()
    document = {
        "schema": SCHEMA,
        **{f.name: getattr(study, f.name) for f in dataclasses.fields(study)},
        "runs": [
            {**dataclasses.asdict(run), "survived": run.survived, "learned": run.learned}
            for run in study.runs
        ],
        "rows": [{**dataclasses.asdict(row), "accuracy": row.accuracy} for row in rows],
        "conclusions": dict(conclusions(rows)),
    }
    text = json.dumps(_encode(document), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read(path: pathlib.Path) -> Study:
    """Read what :func:`write` wrote.

    Raises:
        ValueError: the file has another schema.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(f"read: {path} must have schema {SCHEMA}, got {document.get('schema')!r}")
    values = {f.name: document[f.name] for f in dataclasses.fields(Study)}
    values["command_line"] = tuple(values["command_line"])
    values["runs"] = tuple(_decode_run(run) for run in document["runs"])
    return Study(**values)


def _decode_run(stored: dict[str, Any]) -> Run:
    values = {f.name: stored[f.name] for f in dataclasses.fields(Run)}
    curve = values.pop("curve")
    numbers = {key: _decode_number(v) if key != "arm" else v for key, v in values.items()}
    return Run(
        **numbers,
        curve=Curve(**{key: tuple(_decode_number(v) for v in curve[key]) for key in curve}),
    )


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
