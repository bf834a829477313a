"""The Python of a page of docs, by its headings."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def snippets(page: str = "distributed.md") -> dict[str, str]:
    """Return the snippets by heading; the second and later ones under a heading have a number."""
    found: dict[str, str] = {}
    text = (DOCS / page).read_text(encoding="utf-8")
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        title = section.partition("\n")[0]
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL)):
            found[f"{title} {number + 1}" if number else title] = code
    return found
