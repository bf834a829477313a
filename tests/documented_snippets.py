"""The Python of docs/distributed.md, by its headings."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"


def snippets() -> dict[str, str]:
    """Of one heading's, the second and later ones have a number."""
    found: dict[str, str] = {}
    for section in re.split(r"^##+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        title = section.partition("\n")[0]
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL)):
            found[f"{title} {number + 1}" if number else title] = code
    return found
