"""HTML and SVG as text in which everything else is escaped."""

from __future__ import annotations

import html
import re

_EMPTY = frozenset({"meta", "br", "path", "line", "rect", "circle", "polygon", "polyline"})


class Markup(str):
    """Text that is markup already: it is not escaped again."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Make an element.

    Args:
        name: of the element.
        *children: markup as it is, any other text escaped.
        **attributes: an underscore at the end of a name is left out, others are hyphens; None
            leaves the attribute out; numbers are written with at most one decimal.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY and not children:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Put pieces after each other: markup as it is, any other text escaped."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c, False) for c in children))


def anchor(text: str) -> str:
    """Return the name of a place in a page: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def decimal(value: float) -> str:
    """Write a coordinate: at most one decimal, which is a tenth of a pixel."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else decimal(value)
