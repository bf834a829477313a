"""Draws a history."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from steadygrad.telemetry.history import Floats, History, Ints
from steadygrad.telemetry.report import EXPLODED_TIMES, Explosion, Report, usual_norms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT = "#333333", "#8a8a8a"
_NORM, _CLIPPED, _SKIPPED = "#9a9a9a", "#0072b2", "#d55e00"  # Okabe and Ito
# The lower panel has at most so many rows, for the parameters that went furthest from their usual norm.
_SHOWN = 24


def plot_history(history: History, path: str | os.PathLike[str]) -> None:
    """Draws norms and limit over the steps, and at level ``"tensor"`` each parameter's norm relative to its usual one.

    Args:
        history: A history of at least one step.
        path: The path of the image; its suffix chooses the format, as in ``matplotlib``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The history has no steps.
    """
    if not len(history):
        raise ValueError("plot: expected at least one recorded step, got none; step first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot: matplotlib is not installed: pip install 'steadygrad[plot]'"
        ) from error
    norms = history.tensor_norms
    shown = 0 if norms is None else min(norms.shape[1], _SHOWN)
    figure = Figure(figsize=(10, 3.4 + (0.9 + 0.23 * shown if shown else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    report = Report(history)
    if norms is None or not shown:
        _totals(figure.subplots(), report)
    else:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 0.6 + 0.23 * shown])
        _totals(upper, report)
        _tensors(figure, lower, report, norms)
    figure.savefig(os.fspath(path), dpi=150)


def _totals(axis: Axes, report: Report) -> None:
    history = report.history
    step = history.step
    finite = np.where(np.isfinite(history.norm), history.norm, np.nan)
    _line(axis, step, finite, color=_NORM, linewidth=1.1, label="norm")
    _line(axis, step, history.clipped_norm, color=_CLIPPED, linewidth=1.3, label="after the clip")
    limit = np.where(np.isfinite(history.limit), history.limit, np.nan)
    if np.isfinite(limit).any():
        axis.plot(step, limit, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="limit")
    positive = [v[np.isfinite(v) & (v > 0)] for v in (finite, history.clipped_norm, limit)]
    if sum(len(values) for values in positive):
        axis.set_yscale("log")
    for mask, marker, name in (
        (history.skipped, "x", "skipped"),
        (history.nonfinite > 0, "^", "not finite"),
    ):
        if mask.any():
            # The markers are at the upper edge, since most of these steps have no finite norm.
            axis.plot(
                step[mask],
                np.full(int(mask.sum()), 0.97 if marker == "x" else 0.91),
                marker,
                color=_SKIPPED,
                markersize=6,
                linestyle="none",
                transform=axis.get_xaxis_transform(),
                label=name,
            )
    if report.explosions:
        middle = (step[0] + step[-1]) / 2
        _name_first(axis, report.explosions[0], report.explosions[0].step > middle)
    axis.set_ylabel("gradient norm", color=_INK)
    rate = report.clip_rate
    clipped = "" if np.isnan(rate) else f", clipped in {100 * rate:.3g} %"
    axis.set_title(
        f"{report.steps} steps{clipped}, skipped {len(report.skipped_steps)}",
        loc="left",
        fontsize=11,
        color=_INK,
    )
    axis.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        borderaxespad=0,
        frameon=False,
        fontsize=8.5,
        ncols=5,
    )
    if history.tensor_norms is None:
        axis.set_xlabel("step", color=_INK)
    _plain(axis)


def _line(axis: Axes, step: Ints, values: Floats, **style: Any) -> None:
    axis.plot(step, values, **style)
    # A line does not show a single number between two steps without one, so those get a dot.
    known = np.isfinite(values)
    alone = known & ~np.append(known[1:], False) & ~np.append(False, known[:-1])
    axis.plot(step[alone], values[alone], ".", color=style["color"], markersize=4)


def _name_first(axis: Axes, explosion: Explosion, to_the_left: bool) -> None:
    axis.axvline(explosion.step, color=_SKIPPED, linewidth=1, linestyle=":", zorder=0)
    text = axis.annotate(
        f"step {explosion.step}: {_shortened(explosion.name)}",
        (explosion.step, 0.04),
        (-4 if to_the_left else 4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        horizontalalignment="right" if to_the_left else "left",
        fontsize=8.5,
        color=_SKIPPED,
    )
    text.set_in_layout(False)


def _tensors(figure: Figure, axis: Axes, report: Report, norms: Floats) -> None:
    from matplotlib.colors import TwoSlopeNorm

    history = report.history
    with np.errstate(all="ignore"):
        times = np.log10(norms / usual_norms(norms))
    counts = history.tensor_nonfinite
    assert counts is not None
    times = np.where(counts > 0, np.inf, times)
    furthest = np.where(np.isnan(times), -np.inf, times).max(axis=0)
    chosen = np.sort(np.argsort(-furthest, kind="stable")[:_SHOWN])
    shown = times[:, chosen].T
    top = max(np.log10(EXPLODED_TIMES), np.max(shown[np.isfinite(shown)], initial=0.0))
    image = axis.pcolormesh(
        np.append(history.step, history.step[-1] + 1) - 0.5,
        np.arange(len(chosen) + 1) - 0.5,
        np.ma.masked_invalid(np.clip(shown, -top, top)),
        cmap="PuOr_r",
        norm=TwoSlopeNorm(0.0, -top, top),
        rasterized=True,
    )
    for row, column in np.argwhere(np.isinf(shown) & (shown > 0)).tolist()[:500]:
        axis.plot(history.step[column], row, "^", color="white", markersize=5)
    names = [history.names[place] for place in chosen]
    axis.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("step", color=_INK)
    left_out = norms.shape[1] - len(chosen)
    axis.set_title(
        "norm of each parameter's gradient, relative to its usual one"
        + (f" ({left_out} calmer ones left out)" if left_out else ""),
        loc="left",
        fontsize=10,
        color=_INK,
    )
    bar = figure.colorbar(image, ax=axis, pad=0.01, aspect=18)
    bar.set_label("times the usual", fontsize=8.5, color=_INK)
    ticks = [t for t in range(int(-top), int(top) + 1) if top <= 4 or t % 2 == 0]
    bar.set_ticks(ticks, labels=[f"$10^{{{t}}}$" if t else "1" for t in ticks])
    _plain(axis)


def _shortened(name: str) -> str:
    short = name if len(name) <= 36 else f"{name[:12]}...{name[-21:]}"
    return short.replace("$", r"\$").replace("\n", " ")


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_FAINT)
    axis.tick_params(colors=_INK, labelsize=8.5)
