"""Runs condensed: one row per arm and learning rate, one sentence per arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .training import Run

# Fewer steps than this say nothing about the time of a step: the first ones warm caches up.
_STEPS_FOR_A_TIME = 100


@dataclass(frozen=True)
class Row:
    """All seeds of one arm at one learning rate.

    Attributes:
        arm: name of the remedy.
        learning_rate: of SGD.
        runs: number of runs.
        survived: how many of them survived.
        learned: how many of them learned.
        accuracies: test accuracies of the runs whose outputs were finite, ascending.
        nonfinite_steps: first non-finite step of the runs that had one, ascending.
        clipped_share: share of all steps at which the clip was active.
        max_grad_norm: largest gradient norm before clipping.
        seconds_per_step: median over runs of at least 100 steps, None without such a run.
    """

    arm: str
    learning_rate: float
    runs: int
    survived: int
    learned: int
    accuracies: tuple[float, ...]
    nonfinite_steps: tuple[int, ...]
    clipped_share: float
    max_grad_norm: float
    seconds_per_step: float | None

    @property
    def accuracy(self) -> float | None:
        """Mean test accuracy of the runs whose outputs were finite, None without such a run."""
        return statistics.fmean(self.accuracies) if self.accuracies else None


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Group runs by arm, in order of appearance, and then by learning rate, ascending."""
    groups: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.arm, {}).setdefault(run.learning_rate, []).append(run)
    return [_row(rates[rate]) for rates in groups.values() for rate in sorted(rates)]


def _row(runs: list[Run]) -> Row:
    times = [run.seconds_per_step for run in runs if run.steps >= _STEPS_FOR_A_TIME]
    norms = [run.max_grad_norm for run in runs if not math.isnan(run.max_grad_norm)]
    return Row(
        arm=runs[0].arm,
        learning_rate=runs[0].learning_rate,
        runs=len(runs),
        survived=sum(run.survived for run in runs),
        learned=sum(run.learned for run in runs),
        accuracies=tuple(sorted(r.test_accuracy for r in runs if r.test_accuracy is not None)),
        nonfinite_steps=tuple(
            sorted(run.nonfinite_step for run in runs if run.nonfinite_step is not None)
        ),
        clipped_share=sum(run.clipped_steps for run in runs) / sum(run.steps for run in runs),
        max_grad_norm=max(norms, default=math.nan),
        seconds_per_step=statistics.median(times) if times else None,
    )


def conclusions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Say in a sentence what each arm did; the first arm is the baseline.

    Returns:
        Pairs of an arm's name and its sentence, computed from the rows and nothing else.
    """
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row.arm, []).append(row)
    baseline = next(iter(arms.values()), [])
    return [
        (name, _sentence(own, None if own is baseline else baseline)) for name, own in arms.items()
    ]


def _sentence(rows: list[Row], baseline: list[Row] | None) -> str:
    parts = [_counts(rows, baseline)]
    blown = [row for row in rows if row.nonfinite_steps]
    if blown:
        steps = [step for row in blown for step in row.nonfinite_steps]
        tried = sum(row.runs for row in blown)
        parts.append(
            f"at {_rates(blown)} the loss of {len(steps)} of {tried} runs blew up "
            f"({_at_steps(steps)})"
        )
    risen = [row for row in rows if row.survived + len(row.nonfinite_steps) < row.runs]
    if risen:
        parts.append(f"at {_rates(risen)} it stayed finite but ended no lower than it began")
    idle = [row for row in rows if row.survived > row.learned == 0]
    if idle:
        parts.append(f"at {_rates(idle)} it survived without learning")
    best = max(
        (row for row in rows if row.learned == row.runs),
        key=lambda row: row.accuracy or 0.0,
        default=None,
    )
    if best is None:
        parts.append("at no learning rate did every seed learn")
    else:
        parts.append(
            f"it learned best at {best.learning_rate:g}, with a test accuracy of "
            + f"{best.accuracy:.2f}".removeprefix("0")
        )
    return "; ".join(parts) + "."


def _counts(rows: list[Row], baseline: list[Row] | None) -> str:
    runs, survived = sum(row.runs for row in rows), sum(row.survived for row in rows)
    counts = f"{survived} of {runs} runs survived and {sum(row.learned for row in rows)} learned"
    if baseline is None:
        return counts
    theirs = f"{sum(row.survived for row in baseline)} of {sum(row.runs for row in baseline)}"
    return f"{counts} ({baseline[0].arm}: {theirs} survived)"


def _rates(rows: list[Row]) -> str:
    words = [f"{row.learning_rate:g}" for row in rows]
    listed = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    return f"learning rate{'s' if len(words) > 1 else ''} {listed}"


def _at_steps(steps: list[int]) -> str:
    low, high = min(steps), max(steps)
    return f"at step {low}" if low == high else f"at steps {low} to {high}"
