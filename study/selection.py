"""Select the experiments of a study by plain values, which can be sent to another process."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .experiment import Experiment
from .experiments import EXPERIMENTS, MNIST, QUICK, on_data

Mode = Literal["quick", "default", "full"]

_FULL_SEEDS = tuple(range(10))


class SelectionError(ValueError):
    """Raised for an unknown experiment or arm, or a file without an experiment."""


@dataclass(frozen=True)
class Selection:
    """Says which experiments to run, and with what changes."""

    names: tuple[str, ...] = ()  # experiments, or Python files that hold one; empty: all
    mode: Mode = "default"  # "full" has ten seeds, and further problems
    seeds: int = 0  # number of seeds; 0: the seeds of the experiment
    arms: tuple[str, ...] = ()  # names, besides the baseline; empty: all
    data: str | None = None  # folder with MNIST or CIFAR-10, to replace the 5,000 digits

    def experiments(self) -> list[Experiment]:
        """Return the experiments, changed according to mode, seeds, arms and data.

        Raises:
            SelectionError: An experiment or arm is unknown, or a file holds no experiment.
            DataFileError: The folder holds no data.
        """
        default = [QUICK] if self.mode == "quick" else [MNIST] if self.data else EXPERIMENTS
        chosen = [_named(name) for name in self.names] or list(default)
        names = [experiment.name for experiment in chosen]
        if len(set(names)) < len(names):
            raise SelectionError(f"study: expected experiments of different names, got {names}")
        if self.data is not None:
            chosen = on_data(chosen, Path(self.data))
        if self.mode == "full":
            chosen = [experiment.full(_FULL_SEEDS) for experiment in chosen]
        if self.seeds:
            seeds = tuple(range(self.seeds))
            chosen = [dataclasses.replace(experiment, seeds=seeds) for experiment in chosen]
        if not self.arms:
            return chosen
        # An experiment with none of the named arms is left out.
        own = {e.name: [arm.name for arm in e.arms if arm.name in self.arms] for e in chosen}
        there = list(dict.fromkeys(arm.name for e in chosen for arm in e.arms))
        for name in self.arms:
            if name not in there:
                raise SelectionError(
                    f"study: --arms: unknown arm {name!r}: expected some of {', '.join(there)}"
                )
        return [e.with_arms(own[e.name]) for e in chosen if own[e.name]]


def _named(name: str) -> Experiment:
    """Return the experiment of that name, or the ``EXPERIMENT`` of a Python file."""
    if not name.endswith(".py"):
        known = {experiment.name: experiment for experiment in EXPERIMENTS}
        if name in known:
            return known[name]
        there = f"there are {', '.join(known)}, and files that end in .py"
        raise SelectionError(f"study: unknown experiment {name!r}: {there}")
    path = Path(name)
    spec = importlib.util.spec_from_file_location(f"study_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SelectionError(f"study: {path}: {type(error).__name__}: {error}") from error
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        got = type(experiment).__name__
        raise SelectionError(
            f"study: {path}: expected EXPERIMENT = study.Experiment(...), got {got}"
        )
    return experiment
