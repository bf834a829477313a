"""Runs condensed: a row per problem, arm and learning rate, and a row per pair of twins."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .experiment import Experiment
from .intervals import Mean, Rate, mean, rate
from .training import Run

# Fewer steps than this say nothing about the time of a step: the first ones warm caches up.
_STEPS_FOR_A_TIME = 100


@dataclass(frozen=True)
class Norms:
    """Largest gradient norms of several runs.

    Attributes:
        median: of the runs' largest norms.
        largest: of them.
    """

    median: float
    largest: float


@dataclass(frozen=True)
class Reached:
    """How fast runs were.

    Attributes:
        reached: runs that reached the target.
        of: runs.
        median: steps of those that did, None where none did.
    """

    reached: int
    of: int
    median: float | None


@dataclass(frozen=True)
class Row:
    """All seeds of one arm at one learning rate on one problem.

    Attributes:
        problem: its name.
        arm: name of the remedy.
        learning_rate: of SGD.
        runs: number of runs.
        survived: how many of them survived.
        learned: how many of them learned.
        exploded: how many of them exploded at some step, survived or not.
        metric: on held-out data, over the runs whose outputs were finite.
        final_loss: over the runs where it was finite.
        clip_rate: share of a run's steps at which the clip was active.
        skip_rate: share of a run's steps that were left out.
        max_grad_norm: largest gradient norm before clipping.
        median_grad_norm: of the median norms of the runs.
        steps_to_target: until the metric had reached the problem's target.
        seconds_per_step: over the runs of at least 100 steps.
        memory_bytes: of a step, the largest over runs.
        nonfinite_steps: first non-finite step of the runs that had one, ascending.
        exploded_steps: step of the explosion of the runs that had one, ascending.
        exploded_parameters: parameter that exploded first -> number of runs, most runs first.
    """

    problem: str
    arm: str
    learning_rate: float
    runs: int
    survived: Rate
    learned: Rate
    exploded: Rate
    metric: Mean | None
    final_loss: Mean | None
    clip_rate: Mean | None
    skip_rate: Mean | None
    max_grad_norm: Norms
    median_grad_norm: Mean | None
    steps_to_target: Reached
    seconds_per_step: Mean | None
    memory_bytes: int
    nonfinite_steps: tuple[int, ...]
    exploded_steps: tuple[int, ...]
    exploded_parameters: dict[str, int]


@dataclass(frozen=True)
class Twin:
    """The same remedy by us and by torch, run by run.

    Attributes:
        problem: its name.
        learning_rate: of SGD.
        ours: name of our arm.
        torch: name of torch's.
        first_difference: largest relative difference of batch losses over the first 5 steps; later
            steps are chaotic, and differ by more than rounding.
        metric_difference: ours less torch's, paired by seed.
        time_ratio: torch's seconds per step over ours, paired by seed.
    """

    problem: str
    learning_rate: float
    ours: str
    torch: str
    first_difference: float | None
    metric_difference: Mean | None
    time_ratio: Mean | None


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Group runs by problem and arm, in order of appearance, and then by learning rate, ascending."""
    groups: dict[str, dict[str, dict[float, list[Run]]]] = {}
    for run in runs:
        arms = groups.setdefault(run.problem, {})
        arms.setdefault(run.arm, {}).setdefault(run.learning_rate, []).append(run)
    return [
        _row(sorted(rates[each], key=lambda run: run.seed))
        for arms in groups.values()
        for rates in arms.values()
        for each in sorted(rates)
    ]


def _row(runs: list[Run]) -> Row:
    first = runs[0]
    norms = [run.max_grad_norm for run in runs if not math.isnan(run.max_grad_norm)]
    reached = [run.steps_to_target for run in runs if run.steps_to_target is not None]
    parameters = Counter(run.exploded_parameter for run in runs if run.exploded_parameter)
    return Row(
        problem=first.problem,
        arm=first.arm,
        learning_rate=first.learning_rate,
        runs=len(runs),
        survived=rate(run.survived for run in runs),
        learned=rate(run.learned for run in runs),
        exploded=rate(run.exploded_step is not None for run in runs),
        metric=mean(run.metric for run in runs),
        final_loss=mean(run.final_loss for run in runs),
        clip_rate=mean(run.clipped_steps / run.steps for run in runs),
        skip_rate=mean(run.skipped_steps / run.steps for run in runs),
        max_grad_norm=Norms(
            statistics.median(norms) if norms else math.nan, max(norms, default=math.nan)
        ),
        median_grad_norm=mean(run.median_grad_norm for run in runs),
        steps_to_target=Reached(
            len(reached), len(runs), statistics.median(reached) if reached else None
        ),
        seconds_per_step=mean(
            run.seconds_per_step for run in runs if run.steps >= _STEPS_FOR_A_TIME
        ),
        memory_bytes=max(run.memory_bytes for run in runs),
        nonfinite_steps=tuple(sorted(run.nonfinite_step for run in runs if run.nonfinite_step)),
        exploded_steps=tuple(sorted(run.exploded_step for run in runs if run.exploded_step)),
        exploded_parameters=dict(parameters.most_common()),
    )


def twins(experiment: Experiment, runs: Sequence[Run]) -> list[Twin]:
    """Compare each arm of ours with torch's equivalent, where both were run."""
    made = {run.key: run for run in runs}
    found = []
    for arm in experiment.arms:
        if arm.twin is None:
            continue
        for problem in experiment.problems:
            for learning_rate in experiment.learning_rates:
                pairs = [
                    (made[ours], run)
                    for key, run in made.items()
                    if key[:3] == (problem.name, arm.name, learning_rate)
                    and (ours := key._replace(arm=arm.twin)) in made
                ]
                if pairs:
                    found.append(_twin(pairs))
    return found


def _twin(pairs: list[tuple[Run, Run]]) -> Twin:
    ours, theirs = pairs[0]
    differences = [
        abs(a - b) / abs(b)
        for one, other in pairs
        for a, b in zip(one.first_losses, other.first_losses, strict=False)
        if math.isfinite(a) and math.isfinite(b) and b
    ]
    return Twin(
        problem=ours.problem,
        learning_rate=ours.learning_rate,
        ours=ours.arm,
        torch=theirs.arm,
        first_difference=max(differences, default=None),
        metric_difference=mean(
            one.metric - other.metric
            for one, other in pairs
            if one.metric is not None and other.metric is not None
        ),
        time_ratio=mean(
            other.seconds_per_step / one.seconds_per_step
            for one, other in pairs
            if min(one.steps, other.steps) >= _STEPS_FOR_A_TIME
        ),
    )
