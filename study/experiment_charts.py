"""Charts of an experiment: the metric with its intervals, and loss and norm over the steps."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence

from study.pages import Bar, Charts, Line, Markup, Plot, Scale, bar_chart, line_chart, swatch

from . import outcome
from .outcome import Json, Setting

_RANKS = 5
_ROOM_ABOVE = 1e4  # how far above the highest start an exploding line is followed


def figure(value: float) -> str:
    """Write a metric, a loss or a norm: three digits, a power of ten where it is far from 1."""
    if math.isfinite(value) and (value == 0 or 1e-3 <= abs(value) < 1e5):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}".replace("e+", "e").replace("e0", "e").replace("e-0", "e-")


def setting_name(experiment: Json, setting: Setting) -> str:
    """Name a setting by what tells it from the others of its experiment."""
    problem, rate = setting
    if len(experiment["problems"]) == 1:
        return f"learning rate {rate:g}"
    if len(experiment["learning_rates"]) == 1:
        return problem
    return f"{problem}, learning rate {rate:g}"


def metric_charts(experiment: Json) -> Charts:
    """Bars of the metric, a chart for each setting."""
    metrics = {problem["name"]: problem["metric"] for problem in experiment["problems"]}
    names = dict.fromkeys(metric["name"] for metric in metrics.values())
    directions = {metric["better"] for metric in metrics.values()}
    beyond = "" if directions == {"higher"} else " Bars up to the right edge end beyond it."
    caption = (
        f"Mean {' and '.join(names)} on held-out data"
        + (f" ({directions.pop()} is better)" if len(directions) == 1 else "")
        + ", with its 95 % interval and the single runs. Pale bars: not every run learned; hatched "
        "bars: not even half of them. Dotted line: guessing; dashed line: threshold of "
        f"learning.{beyond}"
    )
    bars = {setting: _metric_bars(experiment, setting) for setting in outcome.settings(experiment)}
    everything = [bar for own in bars.values() for bar in own]
    scales = {
        name: _metric_scale([m for m in metrics.values() if m["name"] == name], everything)
        for name in names
    }
    charts = []
    for setting, own in bars.items():
        metric = metrics[setting[0]]
        marks = [(metric["guessing"], "dotted"), (metric["learned"], "dashed")]
        chart = bar_chart(
            setting_name(experiment, setting),
            own,
            scales[metric["name"]],
            origin=0.0,
            axis=metric["name"],
            marks=marks,
            beside=everything,
        )
        charts.append(chart)
    return Charts(caption, charts, name=f"{experiment['name']} results")


def _metric_bars(experiment: Json, setting: Setting) -> list[Bar]:
    rows = (
        (arm["name"], outcome.row_of(experiment, arm["name"], setting))
        for arm in outcome.remedies(experiment)
    )
    return [_metric_bar(name, row) for name, row in rows if row is not None]


def _metric_scale(metrics: Sequence[Json], bars: Sequence[Bar]) -> Scale:
    """The scale of all charts with one metric."""
    guessing = max(metric["guessing"] for metric in metrics)
    values = [bar.value for bar in bars if bar.value is not None]
    most = max([*values, guessing, *(metric["learned"] for metric in metrics)])
    if metrics[0]["better"] == "higher":
        return Scale(0.0, max(most, 1.0))
    # What has no upper end: far beyond guessing, bars end at the edge.
    return Scale(0.0, min(most, 1.5 * guessing) or 1.0)


def _metric_bar(name: str, row: Json) -> Bar:
    mean, learned, runs = row["metric"], row["learned"]["count"], row["runs"]
    if mean is None:
        return Bar(name, None, "not finite")
    style = "solid" if learned == runs else "pale" if 2 * learned >= runs else "hatched"
    return Bar(
        name,
        mean["mean"],
        figure(mean["mean"]),
        mean["low"],
        mean["high"],
        tuple(mean["values"]),
        style,
    )


def curve_charts(experiment: Json) -> Charts | None:
    """Loss and gradient norm over the steps: a chart for each arm, with a line for each setting.

    With more settings than lines can be told apart: a chart for each arm and problem.
    """
    settings = outcome.settings(experiment)
    if len(settings) <= _RANKS:
        groups = [settings]
    else:
        groups = [
            [setting for setting in settings if setting[0] == problem["name"]]
            for problem in experiment["problems"]
        ]
    charts = [chart for group in groups for chart in _group(experiment, group, len(groups) > 1)]
    if not charts:
        return None
    names = [setting_name(experiment, setting) for setting in groups[0]]
    if len(groups) > 1:
        names = [f"learning rate {rate:g}" for rate in experiment["learning_rates"]]
    legend = [
        (swatch(f"curve rank{_rank(place, len(names))}"), name) for place, name in enumerate(names)
    ]
    if any(arm["limit"] is not None for arm in outcome.remedies(experiment)):
        legend.append((swatch("mark dashed"), "limit of the norm"))
    return Charts(
        "Training loss and gradient norm before the clip, on logarithmic scales. Lines are medians "
        "over the seeds, bands go from the smallest to the largest run, crosses mark the first "
        "step of a run that was not finite.",
        charts,
        legend,
        layout="narrow",
        name=f"{experiment['name']} curves",
    )


def _rank(place: int, count: int) -> int:
    """Spread few lines over the colours, from light to dark."""
    return _RANKS - 1 if count == 1 else round((_RANKS - 1) * min(place, count - 1) / (count - 1))


def _group(experiment: Json, settings: Sequence[Setting], name_problem: bool) -> list[Markup]:
    """Charts on common scales, one for each arm."""
    wanted = set(settings)
    names = {arm["name"] for arm in outcome.remedies(experiment)}
    runs = [
        run
        for run in experiment["runs"]
        if run["curve"] is not None
        and (run["problem"], run["learning_rate"]) in wanted
        and run["arm"] in names
    ]
    if not runs:
        return []
    steps = Scale(0.9, 1.1 * max(max(run["curve"]["step"]) for run in runs), log=True)
    limits = [arm["limit"] for arm in experiment["arms"] if arm["limit"] is not None]
    scales = {
        key: _scale([run["curve"][key] for run in runs], limits if key == "grad_norm" else ())
        for key in ("loss", "grad_norm")
    }
    charts = []
    for arm in outcome.remedies(experiment):
        own = [run for run in runs if run["arm"] == arm["name"]]
        if not own:
            continue
        plots = [
            Plot(name, scales[key], _lines(own, settings, key), limit)
            for key, name, limit in (
                ("loss", "training loss", None),
                ("grad_norm", "gradient norm", arm["limit"]),
            )
        ]
        title = f"{arm['name']}, {settings[0][0]}" if name_problem else arm["name"]
        all_runs = list(outcome.runs_in(experiment, arm["name"], settings))
        subtitle = f"{_count(all_runs, 'survived')} survived, {_count(all_runs, 'learned')} learned"
        charts.append(line_chart(title, subtitle, plots, steps, "step"))
    return charts


def _count(runs: Sequence[Json], outcome_of_run: str) -> str:
    return f"{sum(run[outcome_of_run] for run in runs)} of {len(runs)}"


def _scale(curves: Sequence[Sequence[float]], limits: Sequence[float]) -> Scale:
    """Hold all small values, and leave room above the highest start for what explodes."""
    values = [v for curve in (*curves, limits) for v in curve if 0.0 < v < math.inf]
    starts = [curve[0] for curve in curves if 0.0 < curve[0] < math.inf]
    ceiling = _ROOM_ABOVE * max(starts, default=1.0)
    return Scale.around([min(v, ceiling) for v in values], log=True, default=(0.1, 10.0))


def _lines(runs: Sequence[Json], settings: Sequence[Setting], key: str) -> tuple[Line, ...]:
    lines = []
    for place, setting in enumerate(settings):
        own = [run for run in runs if (run["problem"], run["learning_rate"]) == setting]
        if own:
            lines.append(_line(own, key, _rank(place, len(settings))))
    return tuple(lines)


def _line(runs: Sequence[Json], key: str, rank: int) -> Line:
    """The median of some runs and the band that holds them all."""
    steps = max((run["curve"]["step"] for run in runs), key=lambda steps: steps[-1])
    columns = [[_at(run["curve"], key, step) for run in runs] for step in steps]
    medians = [statistics.median(column) for column in columns]
    return Line(
        x=tuple(steps),
        y=tuple(median if math.isfinite(median) else math.nan for median in medians),
        rank=rank,
        low=tuple(min(column) for column in columns) if len(runs) > 1 else (),
        high=tuple(max(column) for column in columns) if len(runs) > 1 else (),
        ends=tuple(sorted({r["nonfinite_step"] for r in runs if r["nonfinite_step"] is not None})),
    )


def _at(curve: Json, key: str, step: int) -> float:
    """The value of a curve at a step; infinite once the run has ended or is not a number."""
    if step > curve["step"][-1]:
        return math.inf
    value = float(curve[key][max(bisect_right(curve["step"], step) - 1, 0)])
    return math.inf if math.isnan(value) else value
