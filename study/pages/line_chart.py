"""Curves over steps, one plot above the other on a shared axis, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .drawing import number, shortened, svg
from .markup import Markup, element
from .scale import Scale

_WIDTH, _LEFT, _RIGHT = 300.0, 40.0, 292.0
_TITLE, _HEIGHT, _GAP, _AXIS = 36.0, 104.0, 22.0, 28.0


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        x: in ascending order.
        y: a value for each; one that is not a number interrupts the curve, one beyond the scale
            follows its edge.
        rank: 0 to 4: its colour and its dashes.
        low: lower edge of a band around it, one for each x; empty for none.
        high: upper edge of the band.
        ends: where it ended for good, marked by a cross at the upper edge.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    rank: int
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plot:
    """Curves over a common axis.

    Attributes:
        name: of the values, above the plot.
        scale: of the values.
        lines: the curves.
        limit: a value to draw a dashed line at, None for none.
    """

    name: str
    scale: Scale
    lines: tuple[Line, ...]
    limit: float | None = None


def line_chart(
    title: str, subtitle: str, plots: Sequence[Plot], x_scale: Scale, axis: str
) -> Markup:
    """Draw plots above each other.

    Args:
        title: above all, and what a screen reader says, with the subtitle.
        subtitle: below the title.
        plots: from top to bottom.
        x_scale: of the axis that they share.
        axis: what it shows, below it.
    """
    parts: list[str] = [
        element("text", shortened(title, _WIDTH, 12), x=0, y=12, class_="title"),
        element("text", shortened(subtitle, _WIDTH), x=0, y=26, class_="label quiet"),
    ]
    top = _TITLE
    for plot in plots:
        top += 12
        parts += _plot(plot, x_scale, top)
        top += _HEIGHT + _GAP
    bottom = top - _GAP
    parts += [
        element("text", number(value), x=_x(x_scale, value), y=bottom + 12, class_="label middle")
        for value in x_scale.ticks(5)
    ]
    middle = (_LEFT + _RIGHT) / 2
    parts.append(element("text", axis, x=middle, y=bottom + 25, class_="label middle quiet"))
    return svg(f"{title}: {subtitle}", _WIDTH, bottom + _AXIS, parts)


def swatch(classes: str) -> Markup:
    """Draw a piece of a line of the given classes, such as ``"curve rank0"``, for a legend."""
    line = element("path", d="M1 6H29", class_=classes)
    return svg("", 30, 12, [line])


def _x(scale: Scale, value: float) -> float:
    return _LEFT + scale.place(value) * (_RIGHT - _LEFT)


def _plot(plot: Plot, x_scale: Scale, top: float) -> list[str]:
    bottom = top + _HEIGHT

    def y(value: float) -> float:
        return bottom - plot.scale.place(value) * _HEIGHT

    def points(x: Sequence[float], values: Sequence[float], decimals: int = 1) -> list[str]:
        pairs = zip(x, values, strict=True)
        return [f"{_x(x_scale, a):.{decimals}f} {y(b):.{decimals}f}" for a, b in pairs]

    parts: list[str] = [element("text", plot.name, x=0, y=top - 5, class_="label")]
    for value in plot.scale.ticks(4):
        parts += [
            element("line", x1=_LEFT, x2=_RIGHT, y1=y(value), y2=y(value), class_="grid"),
            element("text", number(value), x=_LEFT - 4, y=y(value) + 3.5, class_="label end"),
        ]
    parts += [
        element("line", x1=_x(x_scale, v), x2=_x(x_scale, v), y1=top, y2=bottom, class_="grid")
        for v in x_scale.ticks(5)
    ]
    for line in plot.lines:
        if line.low:
            edge = points(line.x, line.low, 0) + points(line.x, line.high, 0)[::-1]
            parts.append(element("path", d=f"M{'L'.join(edge)}z", class_=f"band rank{line.rank}"))
    for line in plot.lines:
        if path := _path(line, points(line.x, line.y)):
            parts.append(element("path", d=path, class_=f"curve rank{line.rank}"))
    for line in plot.lines:
        # A height of its own for each rank: they often end at the same step.
        height = top + 4 + 8 * line.rank
        crosses = "".join(
            f"M{_x(x_scale, end) - 3:.1f} {height - 3:.1f}l6 6m0 -6l-6 6" for end in line.ends
        )
        if crosses:
            parts.append(element("path", d=crosses, class_=f"cross rank{line.rank}"))
    if plot.limit is not None:
        height = y(plot.limit)
        parts.append(
            element("line", x1=_LEFT, x2=_RIGHT, y1=height, y2=height, class_="mark dashed")
        )
    return parts


def _path(line: Line, points: Sequence[str]) -> str:
    """Join the points, and lift the pen at what is not a number."""
    path, down = [], False
    for point, value in zip(points, line.y, strict=True):
        if math.isnan(value):
            down = False
            continue
        path.append(f"{'L' if down else 'M'}{point}")
        down = True
    return "".join(path)
