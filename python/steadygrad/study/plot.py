"""The picture of a study: a column per arm, with loss, gradient norm and test accuracy."""

from __future__ import annotations

import math
import pathlib
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .data import require
from .record import Study
from .summary import Row
from .training import LEARNED_TIMES_CHANCE, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#222222"
_FAINT = "#767676"
_ROOM_ABOVE = 1e4  # how far above the highest start an exploding line is followed

_Colour = tuple[float, float, float, float]


def plot(study: Study, path: pathlib.Path) -> None:
    """Draw ``study`` into the PNG file ``path``.

    A column is an arm, a colour a learning rate, a line one run. A cross near the upper edge marks
    the step at which the loss of a run was first not finite.

    Args:
        study: at least one run of it was made.
        path: where to; an existing file is replaced.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = study.rows()
    arms = list(dict.fromkeys(row.arm for row in rows))
    colours = _colours(study.experiment["learning_rates"])
    limits = {arm["name"]: arm["max_norm"] for arm in study.experiment["arms"]}
    loss_range = _range([run.curve.loss for run in study.runs])
    # The limits take part, so that their lines are seen even where no gradient comes near them.
    marks = [(limit,) for arm, limit in limits.items() if arm in arms and limit]
    norm_range = _range([*(run.curve.grad_norm for run in study.runs), *marks])

    figure = Figure(figsize=(max(1.95 * len(arms) + 0.9, 8.0), 7.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(arms), sharey="row", squeeze=False, height_ratios=[4, 4, 3])
    for column, arm in enumerate(arms):
        runs = [run for run in study.runs if run.arm == arm]
        own = [row for row in rows if row.arm == arm]
        loss, norm, accuracy = axes[:, column]
        _heading(loss, arm, own)
        _lines(loss, runs, [run.curve.loss for run in runs], colours, loss_range)
        _lines(norm, runs, [run.curve.grad_norm for run in runs], colours, norm_range)
        _limit(norm, limits.get(arm))
        _bars(accuracy, own, colours, study.runs[0].chance)
        for axis in (loss, norm):
            axis.set_xlim(0.9, 1.1 * study.experiment["steps"])
        norm.set_xlabel("step", color=_INK)
        accuracy.set_xlabel("test accuracy", color=_INK)
    for axis, label in zip(axes[:, 0], ("training loss", "gradient norm", ""), strict=True):
        axis.set_ylabel(label, color=_INK)
    _rates(axes[2, 0], colours)
    _legend(figure, study, colours)
    figure.savefig(path)


def _range(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits of a logarithmic axis: all small values, and room above the highest first value."""
    low = min((v for curve in curves for v in curve if 0.0 < v < math.inf), default=1e-3)
    starts = [curve[0] for curve in curves if 0.0 < curve[0] < math.inf]
    return 0.5 * low, _ROOM_ABOVE * max(starts, default=1.0)


def _colours(rates: Sequence[float]) -> dict[float, _Colour]:
    """Light to dark with the learning rate: an order that is seen without colour vision."""
    from matplotlib import colormaps

    scale = colormaps["viridis"]
    last = max(len(rates) - 1, 1)
    return {rate: scale(0.8 - 0.8 * place / last) for place, rate in enumerate(rates)}


def _heading(axis: Axes, arm: str, rows: Sequence[Row]) -> None:
    runs = sum(row.runs for row in rows)
    survived = sum(row.survived for row in rows)
    learned = sum(row.learned for row in rows)
    axis.set_title(
        f"survived {survived}/{runs}, learned {learned}/{runs}",
        fontsize=9,
        color=_FAINT,
        loc="left",
    )
    axis.annotate(
        arm,
        (0, 1),
        (0, 20),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=13,
        fontweight="bold",
        color=_INK,
    )


def _lines(
    axis: Axes,
    runs: Sequence[Run],
    curves: Sequence[Sequence[float]],
    colours: dict[float, _Colour],
    limits: tuple[float, float],
) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    for run, values in zip(runs, curves, strict=True):
        colour = colours[run.learning_rate]
        axis.plot(run.curve.step, values, color=colour, linewidth=1.2, alpha=0.8)
        if run.nonfinite_step is not None:
            # A height of its own for each learning rate: they often fail at the same step.
            height = 0.97 - 0.055 * list(colours).index(run.learning_rate)
            axis.plot(
                run.nonfinite_step,
                height,
                "x",
                color=colour,
                markersize=6,
                markeredgewidth=1.8,
                transform=axis.get_xaxis_transform(),
            )
    axis.set_ylim(*limits)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    _plain(axis)


def _limit(axis: Axes, max_norm: float | None) -> None:
    if max_norm is None:
        return
    axis.axhline(max_norm, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axis.annotate(
        f"limit {max_norm:g}",
        (0, max_norm),
        (4, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8.5,
        color=_INK,
    )


def _bars(
    axis: Axes,
    rows: Sequence[Row],
    colours: dict[float, _Colour],
    chance: float,
) -> None:
    """Draw a bar per learning rate, a dot per run, and the numbers in a column beside them."""
    places = {rate: place for place, rate in enumerate(colours)}
    for row in rows:
        place, colour = places[row.learning_rate], colours[row.learning_rate]
        notes = []
        if row.accuracy is not None:
            axis.barh(place, row.accuracy, height=0.62, color=colour, alpha=0.45)
            axis.plot(
                row.accuracies, [place] * len(row.accuracies), ".", color=colour, markersize=7
            )
            notes.append(f"{row.accuracy:.2f}".removeprefix("0"))
        if row.nonfinite_steps:
            notes.append(f"\N{MULTIPLICATION X} {len(row.nonfinite_steps)}/{row.runs}")
        axis.text(1.06, place, "  ".join(notes), va="center", fontsize=9, color=_INK)
    for mark, style in ((chance, ":"), (LEARNED_TIMES_CHANCE * chance, "--")):
        axis.axvline(mark, color=_FAINT, linewidth=1, linestyle=style, zorder=0)
    axis.set_xlim(0, 1.72)
    axis.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    axis.set_ylim(-0.6, len(places) - 0.4)
    _plain(axis)


def _rates(axis: Axes, colours: dict[float, _Colour]) -> None:
    axis.set_ylabel("learning rate", color=_INK)
    axis.set_yticks(range(len(colours)), [f"{rate:g}" for rate in colours], fontweight="bold")
    for label, colour in zip(axis.get_yticklabels(), colours.values(), strict=True):
        label.set_color(colour)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.tick_params(colors=_INK, labelsize=9)
    axis.tick_params(which="minor", length=0)


def _legend(figure: Figure, study: Study, colours: dict[float, _Colour]) -> None:
    from matplotlib.lines import Line2D

    handles: list[Line2D] = [
        Line2D([], [], color=colour, linewidth=3, label=f"learning rate {rate:g}")
        for rate, colour in colours.items()
    ]
    handles += [
        Line2D([], [], color=_INK, marker="x", markeredgewidth=2, linewidth=0, label="not finite"),
        Line2D([], [], color=_FAINT, linestyle=":", label="accuracy of guessing"),
        Line2D([], [], color=_FAINT, linestyle="--", label="threshold of learning"),
    ]
    seeds = len({run.seed for run in study.runs})
    title = (
        f"{study.experiment['title']}: {study.experiment['data']}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
        f"{'' if study.status == 'complete' else ' (partial results)'}"
    )
    figure.suptitle(
        textwrap.fill(title, int(9 * figure.get_figwidth())),
        fontsize=13,
        color=_INK,
        x=0.01,
        ha="left",
    )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles) if figure.get_figwidth() > 12 else 4,
        frameon=False,
        fontsize=9.5,
    )
