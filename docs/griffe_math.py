"""Turns the reStructuredText of docstrings into Markdown for the reference pages: mathematics, code, references."""

from __future__ import annotations

import re
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """Return a docstring with its roles, its literals and its ``.. math::`` blocks as Markdown has them."""
    text = re.sub(r"(?m)^( *)\.\. math:: *(.+(?:\n\1 +\S.*)*)", r"\1\\[ \2 \\]", text)
    text = re.sub(r":math:`([^`]+)`", r"\\( \1 \\)", text)
    text = re.sub(r":(?:class|func|meth|attr|mod):`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


class Markdown(griffe.Extension):
    """Converts every docstring as it is collected."""

    def on_instance(self, *, node: Any, obj: griffe.Object, **kwargs: Any) -> None:
        """Convert the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
