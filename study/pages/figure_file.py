"""Charts that stand side by side, as one SVG file: for Markdown, which has no place for drawings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .drawing import shortened, text_width
from .markup import Markup, decimal, element, joined

_COLUMNS = {"wide": 3, "narrow": 4, "ragged": 3}
_GAP, _MARGIN, _KEY = 24.0, 10.0, 18.0


def figure_file(
    caption: str,
    charts: Sequence[Markup],
    legend: Sequence[tuple[Markup, str]],
    layout: str,
    style: str,
) -> str:
    """Lay charts out in a drawing of their own.

    Args:
        caption: what they show, which a screen reader says.
        charts: SVG.
        legend: drawing and name of what is drawn alike in all of them.
        layout: as in ``Charts``; only the number of columns follows from it.
        style: of the page that the charts are made for.
    """
    columns = min(_COLUMNS[layout], len(charts))
    sizes = [_size(chart) for chart in charts]
    width = max(size[0] for size in sizes)
    total = columns * (width + _GAP) - _GAP + 2 * _MARGIN
    parts: list[str] = []
    top = _MARGIN
    left = _MARGIN
    for swatch, name in legend:
        room = 36 + text_width(name) + 20
        if left + room > total:
            left, top = _MARGIN, top + _KEY
        parts.append(_placed(swatch, left, top, *_size(swatch)))
        parts.append(element("text", name, x=left + 36, y=top + 10, class_="label"))
        left += room
    top += _KEY if legend else 0.0
    for start in range(0, len(charts), columns):
        row = list(zip(charts, sizes, strict=True))[start : start + columns]
        for column, (chart, size) in enumerate(row):
            parts.append(_placed(chart, _MARGIN + column * (width + _GAP), top, *size))
        top += max(size[1] for _, size in row) + _GAP
    height = top - _GAP + _MARGIN
    drawing = element(
        "svg",
        element("title", shortened(caption, 1000)),
        element("style", Markup(style)),
        Markup(HATCH),
        element("rect", width=total, height=height, fill="#fff"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {decimal(total)} {decimal(height)}",
        width=total,
        height=height,
        role="img",
    )
    return f"{joined(drawing)}\n"


# A filling that stays when a page is printed without its colours, shared by all drawings.
HATCH = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><path d="M2.5 0V5" class="hatch"/></pattern></defs>'
)


def _size(drawing: Markup) -> tuple[float, float]:
    """The width and height of a drawing's box."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    if box is None:
        raise ValueError(f"figure_file: charts: expected drawings with a box, got {drawing[:80]}")
    return float(box.group(1)), float(box.group(2))


def _placed(drawing: Markup, x: float, y: float, width: float, height: float) -> Markup:
    place = f'x="{decimal(x)}" y="{decimal(y)}" width="{decimal(width)}" height="{decimal(height)}"'
    return Markup(drawing.replace("<svg ", f"<svg {place} ", 1))
