"""What the remedies did to the runs that go wrong without one, over all experiments.

A *setting* is a problem and a learning rate of an experiment. A run is *lost* when it did not
survive, or exploded and did not learn. A setting is *hard* when at least half of the baseline's
runs are lost there: only those settings say whether a remedy keeps training from exploding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .intervals import mean

Json = Mapping[str, Any]
Setting = tuple[str, float]
_NUMBERS = ("problem", "learning_rate", "seed", "steps", "peak_loss", "final_loss", "metric")

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


def differences(experiment: Json, arm: str, setting: Setting) -> list[float]:
    """By how much an arm's runs are better than the baseline's on held-out data, seed by seed.

    A seed gives both the same weights and batches, so their difference says more than two means.
    """
    metrics = {problem["name"]: problem["metric"] for problem in experiment["problems"]}
    sign = 1.0 if metrics[setting[0]]["better"] == "higher" else -1.0
    theirs = {
        run["seed"]: run["metric"] for run in runs_in(experiment, baseline(experiment), [setting])
    }
    return [
        sign * (run["metric"] - theirs[run["seed"]])
        for run in runs_in(experiment, arm, [setting])
        if run["metric"] is not None and theirs.get(run["seed"]) is not None
    ]


def clearly(experiment: Json, arm: str) -> tuple[int, int, int]:
    """Compare an arm with the baseline on held-out data where all runs of the latter learned.

    Clearly means that the 95 % interval of the difference, seed by seed, is above or below 0.

    Returns:
        In how many settings it is clearly better, clearly worse, and neither.
    """
    better = worse = neither = 0
    for setting in settings(experiment):
        own, theirs = (
            row_of(experiment, arm, setting),
            row_of(experiment, baseline(experiment), setting),
        )
        if own is None or theirs is None or theirs["learned"]["count"] < theirs["runs"]:
            continue
        difference = mean(differences(experiment, arm, setting))
        if own["metric"] is None or len(own["metric"]["values"]) < own["runs"]:
            worse += 1  # a run without a finite answer is worse than any that learned
        elif difference is None or difference.low is None or difference.high is None:
            neither += 1
        elif difference.low > 0:
            better += 1
        elif difference.high < 0:
            worse += 1
        else:
            neither += 1
    return better, worse, neither


def equal_runs(experiment: Json) -> list[list[str]]:
    """Groups of remedies of which each run is the same, number by number: some of them never acted."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for arm in remedies(experiment):
        runs = runs_in(experiment, arm["name"], settings(experiment))
        # As text: NaN is not equal to itself.
        numbers = tuple(str([run[name] for name in _NUMBERS]) for run in runs)
        groups.setdefault(numbers, []).append(arm["name"])
    return [names for names in groups.values() if len(names) > 1]


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


def listed(words: Sequence[str]) -> str:
    """Join words to a list in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
