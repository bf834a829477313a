"""What the remedies did to the runs that go wrong without one, over all experiments.

A *setting* is a problem and a learning rate of an experiment. A run is *lost* when it did not
survive, or exploded and did not learn. A setting is *hard* when at least half of the baseline's
runs are lost there: only those settings say whether a remedy keeps training from exploding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
Setting = tuple[str, float]

MEANING = (
    "A setting is a problem and a learning rate. A run is lost when it did not survive, or "
    "exploded and did not learn; otherwise it is kept. A setting is hard when at least half of the "
    "baseline's runs are lost in it."
)


@dataclass(frozen=True)
class Tally:
    """Runs of one arm.

    Attributes:
        settings: in how many settings they were made.
        runs: how many there are.
        kept: how many of them were not lost.
        learned: how many of them learned.
        exploded: how many of them exploded at some step, kept or not.
    """

    settings: int = 0
    runs: int = 0
    kept: int = 0
    learned: int = 0
    exploded: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.settings + other.settings,
            self.runs + other.runs,
            self.kept + other.kept,
            self.learned + other.learned,
            self.exploded + other.exploded,
        )


def lost(run: Json) -> bool:
    """Whether a run is lost, by the rule of this module."""
    exploded = run["exploded_step"] is not None
    return not run["survived"] or (exploded and not run["learned"])


def baseline(experiment: Json) -> str:
    """The name of the arm that the others are compared with."""
    return str(experiment["arms"][0]["name"])


def remedies(experiment: Json) -> list[Json]:
    """The arms of an experiment without those that repeat another with torch's functions."""
    return [arm for arm in experiment["arms"] if arm["twin"] is None]


def settings(experiment: Json) -> list[Setting]:
    """The settings in which runs were made, problem by problem."""
    made = {(row["problem"], row["learning_rate"]) for row in experiment["rows"]}
    return [
        (problem["name"], rate)
        for problem in experiment["problems"]
        for rate in experiment["learning_rates"]
        if (problem["name"], rate) in made
    ]


def hard_settings(experiment: Json) -> list[Setting]:
    """The settings in which at least half of the baseline's runs are lost."""
    found = []
    for setting in settings(experiment):
        runs = list(runs_in(experiment, baseline(experiment), [setting]))
        if runs and 2 * sum(map(lost, runs)) >= len(runs):
            found.append(setting)
    return found


def runs_in(experiment: Json, arm: str, chosen: Iterable[Setting]) -> Iterator[Json]:
    """The runs of an arm in some settings."""
    wanted = set(chosen)
    for run in experiment["runs"]:
        if run["arm"] == arm and (run["problem"], run["learning_rate"]) in wanted:
            yield run


def row_of(experiment: Json, arm: str, setting: Setting) -> Json | None:
    """The row of an arm in a setting, None if no run was made there."""
    for row in experiment["rows"]:
        if (row["arm"], row["problem"], row["learning_rate"]) == (arm, *setting):
            return dict(row)
    return None


def tally(experiment: Json, arm: str, chosen: Sequence[Setting]) -> Tally:
    """Count the runs of an arm in some settings."""
    total = Tally()
    for setting in chosen:
        if runs := list(runs_in(experiment, arm, [setting])):
            kept = sum(not lost(run) for run in runs)
            learned = sum(run["learned"] for run in runs)
            exploded = sum(run["exploded_step"] is not None for run in runs)
            total += Tally(1, len(runs), kept, learned, exploded)
    return total


def better(metric: Json, one: Json, other: Json) -> int:
    """Compare two means: 1 if ``one`` is clearly better, -1 if clearly worse, 0 if neither.

    Clearly means that their 95 % intervals do not overlap.

    Args:
        metric: of the problem: ``better`` is ``"higher"`` or ``"lower"``.
        one: a mean with its interval.
        other: what it is compared with.
    """
    if None in (one["low"], one["high"], other["low"], other["high"]):
        return 0
    sign = 1 if metric["better"] == "higher" else -1
    if one["low"] > other["high"]:
        return sign
    if one["high"] < other["low"]:
        return -sign
    return 0


def clearly(experiment: Json, arm: str) -> tuple[int, int, int]:
    """Compare an arm with the baseline on held-out data where all runs of the latter learned.

    Returns:
        In how many settings it is clearly better, clearly worse, and neither.
    """
    counts = {1: 0, -1: 0, 0: 0}
    metrics = {problem["name"]: problem["metric"] for problem in experiment["problems"]}
    for setting in settings(experiment):
        own, theirs = (
            row_of(experiment, arm, setting),
            row_of(experiment, baseline(experiment), setting),
        )
        if own is None or theirs is None or theirs["learned"]["count"] < theirs["runs"]:
            continue
        if own["metric"] is None or len(own["metric"]["values"]) < own["runs"]:
            counts[-1] += 1  # a run without a finite answer is worse than any that learned
        else:
            counts[better(metrics[setting[0]], own["metric"], theirs["metric"])] += 1
    return counts[1], counts[-1], counts[0]


def relative_time(experiment: Json, arm: str) -> list[float]:
    """Time of a step of an arm over that of the baseline, in each setting that has both."""
    ratios = []
    for setting in settings(experiment):
        own, theirs = (
            row_of(experiment, arm, setting),
            row_of(experiment, baseline(experiment), setting),
        )
        if own and theirs and own["seconds_per_step"] and theirs["seconds_per_step"]:
            ratios.append(own["seconds_per_step"]["mean"] / theirs["seconds_per_step"]["mean"])
    return ratios
