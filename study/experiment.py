"""Declare an experiment: problems, remedies, learning rates and seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .models import ModelSpec
from .remedies import Arm, check_name, not_default
from .tasks import Task


class RunKey(NamedTuple):
    """Identifies a run within its experiment; results are filed under it."""

    problem: str
    arm: str
    learning_rate: float
    seed: int


def _check(right: bool, place: str, expected: str, got: object) -> None:
    if not right:
        raise ValueError(f"{place}: expected {expected}, got {got}")


@dataclass(frozen=True)
class Problem:
    """Declares a task, a network, and how long the network is trained on the task.

    Raises:
        ValueError: A number is out of its range.
    """

    name: str  # short, and unique in its experiment
    title: str  # network and data, in words
    task: Callable[[], Task]  # loads the data; called once in every process
    model: ModelSpec  # network, initialized as the remedies have to cope with it
    steps: int  # length of a run, in optimizer steps
    batch_size: int  # examples per step
    momentum: float = 0.0  # momentum of SGD
    evaluations: int = 10  # measurements of the metric in a run of full length
    until_target: bool = False  # whether a run ends once the metric has reached its target

    def __post_init__(self) -> None:
        check_name("Problem", self.name)
        for name in ("steps", "batch_size", "evaluations"):
            value = getattr(self, name)
            right = isinstance(value, int) and value >= 1
            _check(right, f"Problem {self.name}: {name}", "an integer of at least 1", repr(value))
        right, place = 0 <= self.momentum < 1, f"Problem {self.name}: momentum"
        _check(right, place, "at least 0 and below 1", self.momentum)

    def describe(self) -> dict[str, Any]:
        """Return the declaration as JSON values."""
        given = [f"{name}={value!r}" for name, value in not_default(self.model).items()]
        plain = ("name", "title", "steps", "batch_size", "evaluations", "until_target")
        return {
            **{name: getattr(self, name) for name in plain},
            "model": f"{type(self.model).__name__}({', '.join(given)})",
            "optimizer": f"SGD, momentum {self.momentum:g}" if self.momentum else "SGD",
        }


@dataclass(frozen=True)
class Experiment:
    """Declares what decides the numbers; every arm gets every problem, learning rate and seed.

    Raises:
        ValueError: A part is missing, two parts have the same name, or the parts do not fit together.
    """

    name: str  # short, used on the command line
    title: str  # what is compared, in words
    about: str  # origin of the problem, and what to look at
    problems: tuple[Problem, ...]  # at least one
    arms: tuple[Arm, ...]  # the first is the baseline that the others are compared with
    learning_rates: tuple[float, ...]  # in ascending order
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # seeds of weights and batches, for every arm
    twin_rates: tuple[float, ...] = ()  # rates of torch's equivalents; empty: all
    full_problems: tuple[Problem, ...] = ()  # further problems of the full study

    def __post_init__(self) -> None:
        """Check, before anything is trained, what a user's own file may get wrong."""
        check_name("Experiment", self.name)
        here = f"Experiment {self.name}"
        for field in ("problems", "arms", "learning_rates", "seeds"):
            values = getattr(self, field)
            _check(bool(values), f"{here}: {field}", "at least one", "none")
            values += self.full_problems if field == "problems" else ()
            names = [getattr(value, "name", value) for value in values]
            _check(len(set(names)) == len(names), f"{here}: {field}", "no two alike", names)
        rates = self.learning_rates
        for rate in rates:
            right = isinstance(rate, float | int) and 0 < rate < math.inf
            _check(right, f"{here}: learning_rates", "finite numbers above 0", repr(rate))
        _check(list(rates) == sorted(rates), f"{here}: learning_rates", "ascending order", rates)
        for seed in self.seeds:
            right = isinstance(seed, int) and seed >= 0
            _check(right, f"{here}: seeds", "integers of at least 0", repr(seed))
        names = [arm.name for arm in self.arms]
        for arm in self.arms:
            right = arm.twin is None or arm.twin in names
            place = f"{here}: arm {arm.name!r}: twin"
            _check(right, place, f"one of {names}", repr(arm.twin))

    def plan(self) -> list[RunKey]:
        """List the runs, seed by seed, an arm and its twin side by side.

        In this order a study that is cut short has still compared all arms, on fewer seeds, and an
        arm and its twin, whose times are compared, run at about the same time.
        """
        names = [arm.name for arm in self.arms]
        paired = sorted(self.arms, key=lambda arm: names.index(arm.twin or arm.name))
        return [
            RunKey(problem.name, arm.name, learning_rate, seed)
            for seed in self.seeds
            for problem in self.problems
            for learning_rate in self.learning_rates
            for arm in paired
            if arm.twin is None or not self.twin_rates or learning_rate in self.twin_rates
        ]

    def full(self, seeds: Sequence[int]) -> Experiment:
        """Return the same experiment with all of its problems, and other seeds."""
        problems = (*self.problems, *self.full_problems)
        return dataclasses.replace(self, problems=problems, full_problems=(), seeds=tuple(seeds))

    def problem(self, name: str) -> Problem:
        """Return the problem of that name."""
        return next(problem for problem in self.problems if problem.name == name)

    def arm(self, name: str) -> Arm:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def with_arms(self, names: Sequence[str]) -> Experiment:
        """Return the same experiment with the baseline and the named arms alone."""
        known = [arm.name for arm in self.arms]
        unknown = [name for name in names if name not in known]
        _check(not unknown, f"Experiment {self.name}: arms", f"some of {known}", unknown)
        chosen = {self.arms[0].name, *names}
        kept = tuple(
            arm if arm.twin in chosen else dataclasses.replace(arm, twin=None)
            for arm in self.arms
            if arm.name in chosen
        )
        return dataclasses.replace(self, arms=kept)

    def describe(self) -> dict[str, Any]:
        """Return the declaration as JSON values, which decide what a run's numbers are."""
        plain = ("name", "title", "about", "learning_rates", "seeds")
        return {
            **{name: getattr(self, name) for name in plain},
            "arms": [arm.describe() for arm in self.arms],
            "problems": [problem.describe() for problem in self.problems],
        }
