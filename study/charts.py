"""Draw the charts of an experiment as SVG: the metric with intervals, loss and norm over steps."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .table import SETTING, Json, figure, in_settings, metric_of, remedies, setting_name

# Lines differ in lightness and in dashes, so that they can be told apart in print and without
# colour vision.
_LINES = (("#5b9bd5", ":"), ("#3f86c4", "-."), ("#2a6cac", "--"), ("#1b4f86", (0, (5, 1))))
_DARKEST = ("#0b2d55", "-")
_RANKS = len(_LINES) + 1
_ROOM_ABOVE = 1e4  # an exploding line is drawn up to this factor above the highest start
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keeps text as text, not as outlines
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}


def _svg(drawing: Figure, name: str) -> str:
    """Return a figure as SVG; the same figure gives the same text each time."""
    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        drawing.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    # One decimal of a coordinate is enough to draw it; numbers in text and comments are kept.
    places = r"(<text.*?</text>|<!--.*?-->)|(\d\.\d)\d+"
    text = re.sub(places, lambda found: found[1] or found[2], file.getvalue(), flags=re.DOTALL)
    # A page holds several figures, so ids would not be unique.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def results(experiment: Json, runs: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Draw the metric on held-out data, a chart per setting: bars, intervals and single runs."""
    names = [arm["name"] for arm in remedies(experiment)]
    rows = rows[rows["arm"].isin(names)]
    settings = [setting for setting, _ in rows.groupby(SETTING, observed=True)]
    across = min(3, len(settings))
    down = math.ceil(len(settings) / across)
    with mpl.rc_context(_STYLE):
        drawing = Figure((1.3 + 3.6 * across, down * (0.9 + 0.17 * len(names))))
        drawing.subplots_adjust(wspace=0.2, hspace=0.7 / (0.2 + 0.17 * len(names)))
        axes = drawing.subplots(down, across, squeeze=False, sharey=True).flat
        for axis, setting in zip(axes, settings, strict=False):
            own = in_settings(rows, [setting])
            single = in_settings(runs, [setting]).groupby("arm", observed=True)["metric"]
            axis.set_title(setting_name(experiment, *setting), loc="left", fontweight="bold")
            _bars(axis, own, dict(iter(single)), metric_of(experiment, setting[0]), names)
        for axis in list(axes)[len(settings) :]:
            axis.set_axis_off()
    return _svg(drawing, f"{experiment['name']} results")


def _bars(
    axis: Axes, rows: pd.DataFrame, single: Mapping[str, Any], metric: Json, names: Sequence[str]
) -> None:
    means = [row.metric.mean for row in rows.itertuples() if row.metric.finite]
    most = max([*means, metric["guessing"], metric["learned"]])
    # A metric without an upper end would need an endless axis, so bars far beyond guessing end at
    # the edge.
    edge = max(most, 1.0) if metric["better"] == "higher" else min(most, 1.5 * metric["guessing"])
    for row in rows.itertuples():
        place, mean = names.index(row.arm), row.metric
        if not mean.finite:
            axis.text(0.01 * edge, place, "not finite", va="center", color="#a02020")
            continue
        hatch = "" if 2 * row.learned >= row.runs else "////"
        fill = "#3f86c4" if row.learned == row.runs else "#bcd4ec"
        axis.barh(place, min(mean.mean, edge), color=fill, hatch=hatch, edgecolor="#1b4f86", lw=0.3)
        if not math.isnan(mean.low):
            axis.plot([mean.low, mean.high], [place, place], color="#222", lw=1)
        label = axis.get_yaxis_transform()  # beside its bar, at the right edge of the chart
        axis.text(1.01, place, figure(mean.mean), va="center", transform=label)
    dots = [
        (value, names.index(arm))
        for arm, values in single.items()
        if arm in names
        for value in values
    ]
    axis.plot(*zip(*dots, strict=True), ".", ms=2.5, color="#222")
    axis.axvline(metric["guessing"], color="#666", ls=":", lw=0.8)
    axis.axvline(metric["learned"], color="#666", ls="--", lw=0.8)
    axis.set(xlim=(0, edge), ylim=(len(names) - 0.5, -0.5), xlabel=metric["name"])
    axis.set_yticks(range(len(names)), names)


def curves(experiment: Json, runs: pd.DataFrame) -> str | None:
    """Draw loss and gradient norm over the steps: two charts per arm, with a line per setting.

    Where there are more settings than lines that can be told apart, there are two charts per arm
    and problem. Returns None where no run has a curve.
    """
    arms = remedies(experiment)
    runs = runs[runs["curve"].notna() & runs["arm"].isin([arm["name"] for arm in arms])]
    if runs.empty:
        return None
    settings = [setting for setting, _ in runs.groupby(SETTING, observed=True)]
    groups = [settings]
    if len(settings) > _RANKS:
        problems = dict.fromkeys(problem for problem, _ in settings)
        groups = [[s for s in settings if s[0] == problem] for problem in problems]
    pairs = [(group, arm) for group in groups for arm in arms]
    across = min(5, len(pairs))
    down = math.ceil(len(pairs) / across)
    with mpl.rc_context(_STYLE):
        height = 3.2 * down + 0.5
        drawing = Figure((2.6 * across, height))
        top = 1 - 0.5 / height
        drawing.subplots_adjust(0.05, 0.3 / height, 0.99, top, wspace=0.28, hspace=0.38)
        axes = drawing.subplots(2 * down, across, squeeze=False)
        for axis in axes.flat[: 2 * down * across]:
            axis.set_axis_off()
        for place, (group, arm) in enumerate(pairs):
            own = in_settings(runs, group)
            chosen = axes[2 * (place // across) :, place % across][:2]
            title = f"{arm['name']}, {group[0][0]}" if len(groups) > 1 else arm["name"]
            chosen[0].set_title(title, loc="left", fontweight="bold")
            for axis, key in zip(chosen, ("loss", "grad_norm"), strict=True):
                axis.set_axis_on()
                _lines(axis, own, own[own["arm"] == arm["name"]], group, key)
                if key == "grad_norm" and arm["limit"] is not None:
                    axis.axhline(arm["limit"], color="#a02020", ls="--", lw=0.8)
            if place % across == 0:
                chosen[0].set_ylabel("training loss")
                chosen[1].set_ylabel("gradient norm")
        names = [setting_name(experiment, *setting) for setting in groups[0]]
        if len(groups) > 1:
            names = [f"learning rate {rate:g}" for _, rate in groups[0]]
        handles = [Line2D([], [], **_look(i, len(names))) for i in range(len(names))]
        drawing.legend(handles, names, loc="upper left", ncols=5, frameon=False)
    return _svg(drawing, f"{experiment['name']} curves")


def _look(place: int, count: int) -> dict[str, Any]:
    """Return colour and dashes of a line; few lines are spread over all shades."""
    rank = _RANKS - 1 if count == 1 else round((_RANKS - 1) * place / (count - 1))
    colour, dashes = (*_LINES, _DARKEST)[rank]
    return {"color": colour, "ls": dashes, "lw": 1.1}


def _lines(
    axis: Axes, everyone: pd.DataFrame, own: pd.DataFrame, settings: Sequence[Any], key: str
) -> None:
    """Draw medians over seeds, bands that hold all runs, and crosses where runs stop being finite."""
    found = [float(value) for curve in everyone["curve"] for value in curve[key]]
    positive = [value for value in found if 0 < value < math.inf]
    starts = [float(curve[key][0]) for curve in everyone["curve"]]
    ceiling = _ROOM_ABOVE * max((s for s in starts if 0 < s < math.inf), default=1.0)
    low, high = min(positive, default=0.1), min(max(positive, default=10.0), ceiling)
    for place, setting in enumerate(settings):
        runs = in_settings(own, [setting])
        if runs.empty:
            continue
        look = _look(place, len(settings))
        steps = max((curve["step"] for curve in runs["curve"]), key=lambda steps: steps[-1])
        values = np.array([_at(curve, key, steps) for curve in runs["curve"]])
        middle = np.median(values, axis=0)
        axis.plot(steps, np.where(np.isfinite(middle), middle, np.nan), **look)
        bands = (
            np.clip(values, low, 2 * high).min(axis=0),
            np.clip(values, low, 2 * high).max(axis=0),
        )
        if len(runs) > 1:
            axis.fill_between(steps, *bands, color=look["color"], alpha=0.2, lw=0)
        ends = runs["nonfinite_step"].dropna().unique()
        axis.plot(ends, [high] * len(ends), "x", color=look["color"], ms=5, clip_on=False)
    last = max(curve["step"][-1] for curve in everyone["curve"])
    axis.set(xscale="log", yscale="log", xlim=(0.9, 1.1 * last), ylim=(low / 1.3, 1.3 * high))
    for scale in (axis.xaxis, axis.yaxis):  # drawing fine ticks and mathematical labels is slow
        scale.set_major_locator(LogLocator(numticks=4))
        scale.set_major_formatter(FuncFormatter(lambda value, _: figure(value)))
        scale.set_minor_locator(NullLocator())
    axis.tick_params(labelbottom=key == "grad_norm")


def _at(curve: Json, key: str, steps: Sequence[int]) -> list[float]:
    """Return the values of a curve at ``steps``: infinite where they are NaN or the run has ended."""
    places = np.searchsorted(curve["step"], steps, side="right") - 1
    values = np.array(curve[key], dtype=float)[places.clip(0)]
    values[np.isnan(values) | (np.asarray(steps) > curve["step"][-1])] = math.inf
    return list(values)
