"""Tabulate the runs of a study, a row for each problem, arm and learning rate, and count over rows.

A *setting* is a problem and a learning rate of an experiment. A run is *lost* when it did not
survive, or exploded and did not learn; otherwise it is *kept*. A setting is *hard* when at least
half of the baseline's runs are lost in it: only hard settings show whether a remedy keeps training
from exploding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

Json = Mapping[str, Any]
SETTING = ["problem", "learning_rate"]
NOTHING = "-"
# The first steps warm caches up, so runs with fewer steps than this say nothing about time.
_STEPS_FOR_A_TIME = 100
_FLOATS = ["final_loss", "peak_loss", "metric", "max_grad_norm", "median_grad_norm"]
_FLOATS += ["exploded_step", "steps_to_target"]
_COMPARED = [*SETTING, "seed", "steps", "peak_loss", "final_loss", "metric"]
# A metric whose name ends like this is a share of all examples; its interval ends at 1.
_SHARES = ("accuracy", "error")


class Mean(NamedTuple):
    r"""Holds a mean and Student's interval, :math:`\bar x \pm t_{.975, n-1} s / \sqrt n`.

    The interval is NaN for a single value; ``finite`` counts the values.
    """

    mean: float
    low: float
    high: float
    finite: int

    def text(self, factor: float = 1.0, short: bool = False) -> str:
        """Return the mean times ``factor``, with its interval; ``short`` has two decimals."""
        if not self.finite:
            return NOTHING
        scaled = [factor * value for value in self[:3]]
        mean, low, high = (f"{value:.2f}" if short else figure(value) for value in scaled)
        return mean if math.isnan(self.low) else f"{mean} ({low}{'-' if short else ' to '}{high})"


def mean_of(values: pd.Series, least: float = -math.inf, most: float = math.inf) -> Mean:
    """Return the mean of the finite values; its interval is cut off at ``least`` and ``most``."""
    kept = values[values.abs() < math.inf]
    if len(kept) < 2:
        return Mean(float(kept.mean()) if len(kept) else math.nan, math.nan, math.nan, len(kept))
    mean, half = float(kept.mean()), float(stats.t.ppf(0.975, len(kept) - 1) * stats.sem(kept))
    return Mean(mean, max(mean - half, least), min(mean + half, most), len(kept))


def wilson(count: int, of: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, which holds for few runs and for shares of 0 and 1."""
    low, high = stats.binomtest(count, of).proportion_ci(method="wilson")
    return float(low), float(high)


def figure(value: float) -> str:
    """Format a number in three digits, with a power of ten if it is far from 1."""
    if math.isfinite(value) and (value == 0 or 1e-3 <= abs(value) < 1e5):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}".replace("e+", "e").replace("e0", "e").replace("e-0", "e-")


def baseline(experiment: Json) -> str:
    """Return the name of the arm that all others are compared with."""
    return str(experiment["arms"][0]["name"])


def remedies(experiment: Json) -> list[Json]:
    """Return the arms of an experiment, without those that repeat another in torch."""
    return [arm for arm in experiment["arms"] if arm["twin"] is None]


def metric_of(experiment: Json, problem: str) -> Json:
    """Return the metric of a problem."""
    return next(p["metric"] for p in experiment["problems"] if p["name"] == problem)


def setting_name(experiment: Json, problem: str, rate: float) -> str:
    """Return a name for a setting that tells it from the others of its experiment."""
    if len(experiment["problems"]) == 1:
        return f"learning rate {rate:g}"
    return problem if len(experiment["learning_rates"]) == 1 else f"{problem}, {rate:g}"


def runs_of(experiment: Json) -> pd.DataFrame:
    """Return the runs of a record sorted by seed, with the columns ``exploded`` and ``kept``.

    Raises:
        ValueError: A run names a problem or an arm that the experiment does not have.
    """
    runs = pd.DataFrame(experiment["runs"]).sort_values("seed", kind="stable")
    runs[_FLOATS] = runs[_FLOATS].astype(float)  # non-finite numbers are strings in JSON
    for key in ("problem", "arm"):  # categories keep groups in the order of the declaration
        names = [each["name"] for each in experiment[f"{key}s"]]
        if unknown := sorted(set(runs[key]) - set(names)):
            raise ValueError(f"{experiment['name']}: expected a {key} of {names}, got {unknown}")
        runs[key] = pd.Categorical(runs[key], names, ordered=True)
    runs["exploded"] = runs["exploded_step"].notna()
    runs["kept"] = runs["survived"] & (~runs["exploded"] | runs["learned"])
    return runs


def summarise(experiment: Json, runs: pd.DataFrame) -> pd.DataFrame:
    """Condense runs to a row for each problem, arm and learning rate, in this order.

    The columns are ``runs``, the number of runs; how many ``survived``, ``learned``, ``exploded``
    and were ``kept``; ``metric`` on held-out data and ``seconds`` of a step (:class:`Mean`); the
    shares of steps that were clipped (``clip_rate``) and skipped (``skip_rate``); ``largest_norm``
    and ``median_norm``; the number of runs that ``reached`` the target, and the median of their
    ``steps_to_target``; ``memory`` in bytes; the first ``exploded_step``, and how often each
    parameter exploded first (``exploded_in``).
    """
    keys = ["problem", "arm", "learning_rate"]
    rows = pd.DataFrame(
        dict(zip(keys, key, strict=True)) | _row(own, metric_of(experiment, key[0]))
        for key, own in runs.groupby(keys, observed=True)
    )
    return rows.astype({"problem": runs["problem"].dtype, "arm": runs["arm"].dtype})


def _row(own: pd.DataFrame, metric: Json) -> dict[str, Any]:
    most = 1.0 if metric["name"].endswith(_SHARES) else math.inf
    least = 0.0 if (own["metric"].dropna() >= 0).all() else -math.inf
    long = own.loc[own["steps"] >= _STEPS_FOR_A_TIME, "seconds_per_step"]
    return {
        "runs": len(own),
        **{name: int(own[name].sum()) for name in ("survived", "learned", "exploded", "kept")},
        "metric": mean_of(own["metric"], least, most),
        "seconds": mean_of(long, 0.0),
        "clip_rate": (own["clipped_steps"] / own["steps"]).mean(),
        "skip_rate": (own["skipped_steps"] / own["steps"]).mean(),
        "largest_norm": own["max_grad_norm"].max(),
        "median_norm": mean_of(own["median_grad_norm"]).mean,
        "reached": int(own["steps_to_target"].count()),
        "steps_to_target": own["steps_to_target"].median(),
        "memory": own["memory_bytes"].max(),
        "exploded_step": own["exploded_step"].min(),
        "exploded_in": dict(Counter(own["exploded_parameter"].dropna()).most_common()),
    }


# Maps each column to the text of a row; pages show all columns, the command line a few.
COLUMNS: dict[str, Callable[[Any], str]] = {
    "learning rate": lambda row: f"{row.learning_rate:g}",
    "survived": lambda row: f"{row.survived}/{row.runs}",
    "learned": lambda row: f"{row.learned}/{row.runs}",
    "metric": lambda row: row.metric.text(),
    "clipped": lambda row: f"{100 * row.clip_rate:.3g} %" if row.clip_rate else NOTHING,
    "largest norm": lambda row: _number(row.largest_norm),
    "ms a step": lambda row: row.seconds.text(1e3),
    "exploded": lambda row: f"{row.exploded}/{row.runs}",
    "first at step": lambda row: _number(row.exploded_step),
    "first in": lambda row: next((f"{n} ({k})" for n, k in row.exploded_in.items()), NOTHING),
    "steps to target": lambda row: _to_target(row),
    "median norm": lambda row: _number(row.median_norm),
    "skipped": lambda row: f"{100 * row.skip_rate:.3g} %" if row.skip_rate else NOTHING,
    "MiB": lambda row: f"{row.memory / 2**20:.3g}",
}


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else figure(value)


def _to_target(row: Any) -> str:
    if not row.reached:
        return NOTHING
    part = "" if row.reached == row.runs else f" ({row.reached} of {row.runs})"
    return f"{row.steps_to_target:,.0f}{part}"


def hard_settings(experiment: Json, runs: pd.DataFrame) -> list[tuple[str, float]]:
    """Return the settings in which at least half of the baseline's runs are lost."""
    own = runs[runs["arm"] == baseline(experiment)]
    kept = own.groupby(SETTING, observed=True)["kept"].mean()
    return list(kept[kept <= 0.5].index)


def in_settings(runs: pd.DataFrame, settings: Sequence[tuple[str, float]]) -> pd.DataFrame:
    """Return the runs that were made in the given settings."""
    return runs[pd.MultiIndex.from_frame(runs[SETTING].astype(object)).isin(settings)]


def held_out(experiment: Json, runs: pd.DataFrame, arm: str) -> tuple[int, int, int]:
    """Compare an arm with the baseline on held-out data, where all runs of the baseline learned.

    A seed gives both the same weights and batches, so runs are compared seed by seed. The arm is
    clearly better or worse where the 95 % interval of the mean difference is above or below 0. It
    is also worse where one of its runs has no finite metric.

    Returns:
        The number of settings in which the arm is clearly better, the number in which it is clearly
        worse, and the number of settings that were compared.
    """
    better = worse = total = 0
    theirs = dict(iter(runs[runs["arm"] == baseline(experiment)].groupby(SETTING, observed=True)))
    for setting, own in runs[runs["arm"] == arm].groupby(SETTING, observed=True):
        base = theirs.get(setting)
        if base is None or not base["learned"].all():
            continue
        total += 1
        if own["metric"].isna().any():
            worse += 1
            continue
        sign = 1.0 if metric_of(experiment, setting[0])["better"] == "higher" else -1.0
        found = mean_of(sign * (own.set_index("seed")["metric"] - base.set_index("seed")["metric"]))
        better, worse = better + (found.low > 0), worse + (found.high < 0)
    return better, worse, total


def same_runs(experiment: Json, runs: pd.DataFrame) -> list[list[str]]:
    """Return groups of remedies whose runs have equal numbers, since their difference never acted."""
    groups: dict[str, list[str]] = {}
    for arm in remedies(experiment):
        own = runs.loc[runs["arm"] == arm["name"], _COMPARED].sort_values(_COMPARED[:3])
        if len(own):
            groups.setdefault(own.to_csv(index=False), []).append(arm["name"])
    return [names for names in groups.values() if len(names) > 1]


def twins(experiment: Json, runs: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Yield a row for each arm and its equivalent in torch, in each setting that has runs of both.

    Runs are compared seed by seed. The first difference is the largest relative difference of the
    batch losses of the first steps; later losses are chaotic.
    """
    for arm in experiment["arms"]:
        if arm["twin"] is None:
            continue
        ours, theirs = (runs[runs["arm"] == name] for name in (arm["twin"], arm["name"]))
        pairs = ours.merge(theirs, on=[*SETTING, "seed"], suffixes=("", "_torch"))
        for (problem, rate), own in pairs.groupby(SETTING, observed=True):
            losses = zip(own["first_losses"], own["first_losses_torch"], strict=True)
            numbers = [(float(a), float(b)) for pair in losses for a, b in zip(*pair, strict=False)]
            differences = [
                abs(a - b) / abs(b)
                for a, b in numbers
                if math.isfinite(a) and 0 < abs(b) < math.inf
            ]
            first = max(differences, default=math.nan)
            timed = own[own[["steps", "steps_torch"]].min(axis=1) >= _STEPS_FOR_A_TIME]
            yield {
                "ours": arm["twin"],
                "torch's": arm["name"],
                "setting": setting_name(experiment, problem, rate),
                "first difference": "none" if first == 0 else _number(first),
                "ours - torch's": mean_of(own["metric"] - own["metric_torch"]).text(),
                "time": mean_of(timed["seconds_per_step_torch"] / timed["seconds_per_step"]).text(),
            }
