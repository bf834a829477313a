"""What all charts share: the SVG around them, and text that has to fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .markup import Markup, decimal, element, joined

# The mean width of a letter of labels and ticks, as a share of the size of the type.
_LETTER = 0.58
LABEL_SIZE = 10.5

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def svg(title: str, width: float, height: float, parts: Sequence[str]) -> Markup:
    """Wrap what was drawn; ``title`` is what a screen reader says."""
    return element(
        "svg",
        element("title", title),
        joined(*parts),
        viewBox=f"0 0 {decimal(width)} {decimal(height)}",
        role="img",
    )


def text_width(text: str, size: float = LABEL_SIZE) -> float:
    """Return about how wide ``text`` is."""
    return _LETTER * size * len(text)


def shortened(text: str, width: float, size: float = LABEL_SIZE) -> str:
    """Cut ``text`` to what fits into ``width``."""
    most = int(width / (_LETTER * size) + 1e-6)
    return text if len(text) <= most else text[: max(most - 1, 1)].rstrip() + "…"


def number(value: float) -> str:
    """Write a value of an axis: plainly from .001 to 10,000, as a power of ten beyond."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = f"{value / 10.0**power:.3g}"
    exponent = str(power).translate(_SUPERSCRIPTS)
    return f"10{exponent}" if mantissa == "1" else f"{mantissa}·10{exponent}"
