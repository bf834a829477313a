"""Tables and lines that rich's console shows in colour, and any other as plain text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text as RichText


@dataclass(frozen=True)
class Line:
    """Text in one of rich's styles."""

    text: str
    style: str = ""

    def __str__(self) -> str:
        return self.text

    def __rich__(self) -> RichText:
        from rich.text import Text

        return Text(self.text, style=self.style)


@dataclass
class Table:
    """Rows of text under headings.

    Attributes:
        title: the line above.
        left: headings of the columns that start at the left.
        right: headings of the columns after these, which end at the right.
        rows: cells; short rows leave the last columns empty.
    """

    title: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    rows: list[tuple[Line, ...]] = field(default_factory=list)

    def add(self, *cells: str | Line) -> None:
        """Append a row."""
        self.rows.append(tuple(Line(cell) if isinstance(cell, str) else cell for cell in cells))

    @property
    def width(self) -> int:
        """Of the longest line as rich draws it, with three spaces between columns and two around them."""
        lines = [(*self.left, *self.right), *([cell.text for cell in row] for row in self.rows)]
        columns = zip_longest(*lines, fillvalue="")
        return sum(max(map(len, column)) + 3 for column in columns) + 1

    def __str__(self) -> str:
        headings = (*self.left, *self.right)
        lines = [headings, *([cell.text for cell in row] for row in self.rows)]
        padded = [[*line, *[""] * (len(headings) - len(line))] for line in lines]
        widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
        split = len(self.left)

        def joined(cells: Iterable[str]) -> str:
            return "  ".join(
                f"{cell:<{width}}" if index < split else f"{cell:>{width}}"
                for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()

        ruled = [joined(padded[0]), "-" * (sum(widths) + 2 * len(widths) - 2)]
        return "\n".join([self.title, *ruled, *map(joined, padded[1:]), ""])

    def __rich__(self) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, heading in enumerate(self.left):
            table.add_column(heading, no_wrap=index == 0)
        for heading in self.right:
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(*(cell.__rich__() for cell in row))
        return table
