"""What an experiment is: problems, remedies, learning rates and seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .arms import Arm, check_name
from .models import ModelSpec
from .tasks import Task


class RunKey(NamedTuple):
    """Which run of an experiment: what its result is filed under."""

    problem: str
    arm: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Problem:
    """A task, a network, and how long the one is trained on the other.

    Attributes:
        name: short name, unique in its experiment.
        title: what is trained on what, in words.
        task: loads the data; called once in every process.
        model: the network, with the initialization that the remedies have to cope with.
        steps: length of a run, in optimizer steps.
        batch_size: examples per step.
        momentum: of SGD.
        evaluations: how often the metric is looked at in a run of full length.
        until_target: whether a run ends once the metric has reached the task's target.
    """

    name: str
    title: str
    task: Callable[[], Task]
    model: ModelSpec
    steps: int
    batch_size: int
    momentum: float = 0.0
    evaluations: int = 10
    until_target: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: one is out of its range.
        """
        check_name("Problem", self.name)
        for field in ("steps", "batch_size", "evaluations"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"Problem {self.name}: {field}: expected an integer of at least 1, got {value!r}"
                )
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"Problem {self.name}: momentum: expected at least 0 and below 1, got {self.momentum}"
            )


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the numbers; each arm meets each problem, learning rate and seed.

    Attributes:
        name: short name, used on the command line.
        title: what is compared, in words.
        about: where the problem comes from and what to look at.
        problems: at least one.
        arms: the remedies; the first is the baseline that the others are compared with.
        learning_rates: in ascending order.
        seeds: a seed fixes initial weights and batches, the same ones for every arm.
        twin_rates: learning rates at which torch's equivalents are run; empty: at all of them.
        full_problems: further problems, which only the full study has.
    """

    name: str
    title: str
    about: str
    problems: tuple[Problem, ...]
    arms: tuple[Arm, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    twin_rates: tuple[float, ...] = ()
    full_problems: tuple[Problem, ...] = ()

    def __post_init__(self) -> None:
        """Checks what a user's own file may get wrong, before anything is trained.

        Raises:
            ValueError: something is missing, named twice, or does not fit together.
        """
        for field in ("problems", "arms", "learning_rates", "seeds"):
            values = getattr(self, field)
            if not values:
                raise ValueError(f"Experiment {self.name}: {field}: expected at least one")
            if field == "problems":
                values = (*values, *self.full_problems)
            names = [getattr(value, "name", value) for value in values]
            if len(set(names)) < len(names):
                raise ValueError(
                    f"Experiment {self.name}: {field}: expected no two alike, got {names}"
                )
        check_name("Experiment", self.name)
        for rate in self.learning_rates:
            if not isinstance(rate, float | int) or not 0 < rate < math.inf:
                raise ValueError(
                    f"Experiment {self.name}: learning_rates: expected finite numbers above 0, "
                    f"got {rate!r}"
                )
        for seed in self.seeds:
            if not isinstance(seed, int) or seed < 0:
                raise ValueError(
                    f"Experiment {self.name}: seeds: expected integers of at least 0, got {seed!r}"
                )
        if list(self.learning_rates) != sorted(self.learning_rates):
            raise ValueError(
                f"Experiment {self.name}: learning_rates: expected ascending order, "
                f"got {self.learning_rates}"
            )
        names = [arm.name for arm in self.arms]
        for arm in self.arms:
            if arm.twin is not None and arm.twin not in names:
                raise ValueError(
                    f"Experiment {self.name}: arm {arm.name!r}: twin: expected one of {names}, "
                    f"got {arm.twin!r}"
                )
            for problem in (*self.problems, *self.full_problems):
                self._check_model(arm, problem)

    def _check_model(self, arm: Arm, problem: Problem) -> None:
        fields = [field.name for field in dataclasses.fields(problem.model)]
        unknown = [name for name in arm.model if name not in fields]
        if unknown:
            raise ValueError(
                f"Experiment {self.name}: arm {arm.name!r}: model: expected fields of "
                f"{type(problem.model).__name__} ({', '.join(fields)}), got {unknown}"
            )

    def plan(self) -> list[RunKey]:
        """List the runs, seed by seed, an arm and its twin side by side.

        A study that is cut short then has compared all arms on fewer seeds, not fewer arms, and
        the two whose times are compared ran at about the same time.
        """
        twins: dict[str, list[Arm]] = {}
        for arm in self.arms:
            if arm.twin is not None:
                twins.setdefault(arm.twin, []).append(arm)
        paired = [
            one for arm in self.arms if arm.twin is None for one in (arm, *twins.get(arm.name, ()))
        ]
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
        """Return the same experiment with those arms alone, and the baseline.

        Raises:
            ValueError: there is no arm of such a name; the message lists those there are.
        """
        known = [arm.name for arm in self.arms]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"unknown arm {unknown[0]!r} in experiment {self.name}: there are "
                + ", ".join(known)
            )
        chosen = {self.arms[0].name, *names}
        kept = tuple(
            arm if arm.twin in chosen else dataclasses.replace(arm, twin=None)
            for arm in self.arms
            if arm.name in chosen
        )
        return dataclasses.replace(self, arms=kept)

    def describe(self) -> dict[str, Any]:
        """Return the declaration as JSON values, which decide what a run's numbers are."""
        return {
            "name": self.name,
            "title": self.title,
            "about": self.about,
            "learning_rates": list(self.learning_rates),
            "seeds": list(self.seeds),
            "arms": [arm.describe() for arm in self.arms],
            "problems": [
                {
                    "name": problem.name,
                    "title": problem.title,
                    "model": _without_defaults(problem.model),
                    "steps": problem.steps,
                    "batch_size": problem.batch_size,
                    "evaluations": problem.evaluations,
                    "until_target": problem.until_target,
                    "optimizer": _optimizer(problem),
                }
                for problem in self.problems
            ],
        }


def _without_defaults(model: ModelSpec) -> str:
    """A dataclass as it would be written, without the fields that are as they are anyway."""
    given = [
        f"{field.name}={getattr(model, field.name)!r}"
        for field in dataclasses.fields(model)
        if getattr(model, field.name) != field.default
    ]
    return f"{type(model).__name__}({', '.join(given)})"


def _optimizer(problem: Problem) -> str:
    return f"SGD, momentum {problem.momentum:g}" if problem.momentum else "SGD"
