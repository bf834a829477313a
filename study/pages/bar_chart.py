"""Horizontal bars with their numbers beside them, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .drawing import number, shortened, svg, text_width
from .markup import Markup, element
from .scale import Scale

_WIDTH = 360.0
_ROW, _TITLE, _AXIS = 17.0, 24.0, 30.0
_MOST_FOR_LABELS = 150.0
_STRONG = 1.12  # how much wider strong type is


@dataclass(frozen=True)
class Bar:
    """One bar; a heading where it has neither value nor text.

    Attributes:
        label: what it is, at the left.
        value: where it ends; None draws no bar.
        text: written at its right.
        low: lower end of the interval around the value, None for none.
        high: upper end of the interval, None for none.
        dots: single values, drawn as dots.
        style: ``"solid"``, ``"pale"`` or ``"hatched"``.
    """

    label: str
    value: float | None = None
    text: str = ""
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()
    style: str = "solid"


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    scale: Scale,
    *,
    origin: float,
    axis: str,
    marks: Sequence[tuple[float, str]] = (),
    beside: Sequence[Bar] = (),
) -> Markup:
    """Draw bars from ``origin`` to their values.

    Args:
        title: above the bars, and what a screen reader says.
        bars: from top to bottom.
        scale: of the values.
        origin: where bars begin.
        axis: what the scale shows, below it.
        marks: value and style, ``"solid"``, ``"dashed"`` or ``"dotted"``, of vertical lines.
        beside: bars of the charts beside it: with the same ones, all leave the same room to labels.
    """
    shown = [bar for bar in (*bars, *beside) if bar.value is not None or bar.text]
    left = 8 + min(_MOST_FOR_LABELS, max((text_width(bar.label) for bar in shown), default=0.0))
    right = _WIDTH - 8 - max((_STRONG * text_width(bar.text) for bar in shown), default=0.0)
    bottom = _TITLE + _ROW * len(bars)

    def x(value: float) -> float:
        return left + scale.place(value) * (right - left)

    parts: list[str] = [
        element("text", shortened(title, _WIDTH, 12), x=0, y=13, class_="title"),
    ]
    for value in scale.ticks(4):
        parts += [
            element("line", x1=x(value), x2=x(value), y1=_TITLE, y2=bottom, class_="grid"),
            element("text", number(value), x=x(value), y=bottom + 12, class_="label middle"),
        ]
    centre = (left + right) / 2
    parts.append(element("text", axis, x=centre, y=bottom + 26, class_="label middle quiet"))
    for row, bar in enumerate(bars):
        parts += _row(bar, _TITLE + _ROW * row, x, origin, left)
    for value, style in marks:
        place = x(value)
        line = element("line", x1=place, x2=place, y1=_TITLE, y2=bottom, class_=f"mark {style}")
        parts.append(line)
    return svg(title, _WIDTH, bottom + _AXIS, parts)


def _row(
    bar: Bar, top: float, x: Callable[[float], float], origin: float, left: float
) -> list[str]:
    baseline, middle = top + 12.5, top + _ROW / 2
    if bar.value is None and not bar.text:
        return [element("text", bar.label, x=0, y=baseline, class_="label strong")]
    label = shortened(bar.label, left - 8)
    parts: list[str] = [element("text", label, x=left - 6, y=baseline, class_="label end")]
    if label != bar.label:
        parts[0] = element("g", element("title", bar.label), parts[0])
    if bar.value is not None:
        start, end = sorted((x(origin), x(bar.value)))
        size = {"x": start, "y": top + 2.5, "width": max(end - start, 0.8), "height": _ROW - 5}
        if bar.style == "hatched":  # a pattern lets what is behind shine through
            parts.append(element("rect", **size, class_="bar pale"))
        parts.append(element("rect", **size, class_=f"bar {bar.style}"))
    parts += [element("circle", cx=x(dot), cy=middle, r=1.8, class_="dot") for dot in bar.dots]
    if bar.low is not None and bar.high is not None:
        low, high = x(bar.low), x(bar.high)
        whisker = f"M{low:.1f} {middle - 3:.1f}v6M{low:.1f} {middle:.1f}H{high:.1f}m0 -3v6"
        parts.append(element("path", d=whisker, class_="whisker"))
    parts.append(element("text", bar.text, x=_WIDTH, y=baseline, class_="label strong end"))
    return parts
