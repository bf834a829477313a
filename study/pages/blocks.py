"""What documents are made of; each block writes itself as HTML and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .figure_file import figure_file
from .markup import Markup, anchor, element, joined


class Block(Protocol):
    """A part of a document."""

    def html(self) -> Markup:
        """Write it as HTML."""

    def markdown(self, figures: str = "") -> str:
        """Write it as Markdown, empty where it is nothing in Markdown.

        Args:
            figures: the folder of the drawings as the file sees it; empty leaves drawings out.
        """


@dataclass(frozen=True)
class Paragraph:
    """Text.

    Attributes:
        text: plain, without markup.
        quiet: whether it is an aside, in a weaker colour.
    """

    text: str
    quiet: bool = False

    def html(self) -> Markup:
        """Write it as HTML."""
        return element("p", self.text, class_="quiet" if self.quiet else None)

    def markdown(self, figures: str = "") -> str:
        """Write it as Markdown."""
        return escaped(self.text)


@dataclass(frozen=True)
class Bullets:
    """A list.

    Attributes:
        items: for each item what is strong in front of it, which may be empty, and its text.
    """

    items: Sequence[tuple[str, str]]

    def html(self) -> Markup:
        """Write it as HTML."""
        items = (
            element("li", joined(element("b", f"{lead}:"), " ", text) if lead else text)
            for lead, text in self.items
        )
        return element("ul", *items)

    def markdown(self, figures: str = "") -> str:
        """Write it as Markdown."""
        return "\n".join(
            f"- **{escaped(lead)}:** {escaped(text)}" if lead else f"- {escaped(text)}"
            for lead, text in self.items
        )


@dataclass(frozen=True)
class Facts:
    """Names and what they stand for, each on a line.

    Attributes:
        pairs: name and text.
    """

    pairs: Sequence[tuple[str, str]]

    def html(self) -> Markup:
        """Write it as HTML."""
        pairs = (joined(element("dt", name), element("dd", text)) for name, text in self.pairs)
        return element("dl", *pairs)

    def markdown(self, figures: str = "") -> str:
        """Write it as Markdown."""
        return "\n".join(f"- {escaped(name)}: {escaped(text)}" for name, text in self.pairs)


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than text.

    Attributes:
        text: what it says.
        note: said below it, smaller.
        style: a class of the page's style, such as ``"heat3"``; says nothing that the text
            does not.
        span: how many columns it takes.
        strong: whether it stands out.
    """

    text: str
    note: str = ""
    style: str = ""
    span: int = 1
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        headings: one for each column.
        rows: cells.
        columns: a letter for each, ``t`` for text, which starts at the left, and ``n`` for numbers;
            empty for one of text and the rest numbers.
        above: headings above the headings, each over ``span`` columns; not in Markdown.
        below: what the headings are below those; ``headings`` themselves where it is empty.
        legend: what styles of cells mean, style and text, above the table; not in Markdown.
        style: a class of the page's style.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    columns: str = ""
    above: Sequence[Cell] = ()
    below: Sequence[str] = ()
    legend: Sequence[tuple[str, str]] = ()
    style: str = ""

    def html(self) -> Markup:
        """Write it as HTML: in a frame that scrolls sideways where it is too wide."""
        head = [
            self._heading(text, index) for index, text in enumerate(self.below or self.headings)
        ]
        rows = [element("tr", *head)]
        if self.above:
            cells = (
                element("th", c.text, colspan=c.span, scope="colgroup", class_="group")
                for c in self.above
            )
            rows.insert(0, element("tr", *cells))
        body = (
            element("tr", *(self._cell(cell, index) for index, cell in enumerate(row)))
            for row in self.rows
        )
        inner = (element("thead", *rows), element("tbody", *body))
        table = element("table", *inner, class_=self.style or None)
        # What scrolls has to be reached without a mouse, and then needs a role and a name.
        frame = element(
            "div", table, class_="scroll", tabindex="0", role="region", aria_label="table"
        )
        if not self.legend:
            return frame
        keys = (element("span", text, class_=f"sample {style}") for style, text in self.legend)
        return joined(element("div", *keys, class_="legend"), frame)

    def markdown(self, figures: str = "") -> str:
        """Write it as Markdown."""
        rules = ["---:" if self._is_number(index) else "---" for index in range(len(self.headings))]
        lines = [[escaped(text) for text in self.headings], rules]
        lines += [[_markdown_cell(cell) for cell in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def _is_number(self, index: int) -> bool:
        return self.columns[index] == "n" if self.columns else index > 0

    def _heading(self, text: str, index: int) -> Markup:
        return element("th", text, scope="col", class_="number" if self._is_number(index) else None)

    def _cell(self, cell: str | Cell, index: int) -> Markup:
        if isinstance(cell, str):
            cell = Cell(cell)
        content = element("b", cell.text) if cell.strong else joined(cell.text)
        if cell.note:
            content = joined(content, element("small", cell.note))
        classes = " ".join(filter(None, ["number" if self._is_number(index) else "", cell.style]))
        if index == 0:
            return element("th", content, scope="row", class_=classes or None)
        return element("td", content, class_=classes or None)


@dataclass(frozen=True)
class Charts:
    """Charts beside each other, as many as there is room for.

    Attributes:
        caption: what they show.
        charts: SVG.
        legend: drawing and name of what is drawn alike in all of them.
        layout: ``"wide"``; ``"narrow"`` for small ones, more of which stand side by side; or
            ``"ragged"`` for ones of different heights, in columns that are read downwards.
        name: of its file in Markdown, unique in its document; empty keeps it out of Markdown.
    """

    caption: str
    charts: Sequence[Markup]
    legend: Sequence[tuple[Markup, str]] = field(default=())
    layout: str = "wide"
    name: str = ""

    def html(self) -> Markup:
        """Write it as HTML."""
        keys = (element("span", swatch, name, class_="key") for swatch, name in self.legend)
        legend = element("div", *keys, class_="legend") if self.legend else ""
        grid = element("div", *self.charts, class_=f"charts {self.layout}")
        caption = element("figcaption", self.caption, legend)
        return element("figure", caption, grid)

    def markdown(self, figures: str = "") -> str:
        """Write a link to the file of its drawing, or nothing if it has no name."""
        if not figures or not self.name:
            return ""
        return f"![{escaped(self.caption)}]({figures}/{self.file})\n\n{escaped(self.caption)}"

    def drawing(self, style: str) -> str:
        """Draw its charts as one SVG file, in the style of the page."""
        return figure_file(self.caption, self.charts, self.legend, self.layout, style)

    @property
    def file(self) -> str:
        """The name of the file of its drawing."""
        return f"{anchor(self.name)}.svg"


@dataclass(frozen=True)
class Section:
    """A heading and what is below it.

    Attributes:
        title: of the section.
        blocks: its content; sections in it have smaller headings.
    """

    title: str
    blocks: Sequence[Block]

    def html(self, level: int = 2, name: str | None = None) -> Markup:
        """Write it as HTML, with a name to link to if one is given."""
        heading = element(f"h{level}", self.title)
        inner = (
            block.html(level + 1) if isinstance(block, Section) else block.html()
            for block in self.blocks
        )
        return element("section", heading, *inner, id=name)

    def markdown(self, figures: str = "", level: int = 2) -> str:
        """Write it as Markdown, empty where all its content is."""
        inner = (
            block.markdown(figures, level + 1)
            if isinstance(block, Section)
            else block.markdown(figures)
            for block in self.blocks
        )
        text = "\n\n".join(filter(None, inner))
        return f"{'#' * level} {escaped(self.title)}\n\n{text}" if text else ""


def escaped(text: str) -> str:
    """Escape what Markdown would take for markup; an underscore within a word is none."""
    return re.sub(r"[\\`*|<\[]|(?<!\w)_", r"\\\g<0>", text)


def _markdown_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return escaped(cell)
    text = escaped(cell.text)
    if cell.strong and text:
        text = f"**{text}**"
    return f"{text} ({escaped(cell.note)})" if cell.note else text
