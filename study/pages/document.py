"""A whole page: its head, its facts, its sections, as one file."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .blocks import Block, Charts, Facts, Section, escaped
from .figure_file import HATCH
from .markup import Markup, anchor, element

_HATCH = Markup(f'<svg width="0" height="0" class="hidden" aria-hidden="true">{HATCH}</svg>')


@dataclass(frozen=True)
class Document:
    """A page.

    Attributes:
        title: at its head.
        lead: a sentence or two below the title.
        summary: blocks before the first section.
        sections: the content; those of the HTML are linked to from its head.
        facts: machine, versions, command line, date and the like, at its end.
    """

    title: str
    lead: str
    summary: Sequence[Block]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]]

    def html(self) -> str:
        """Write it as one HTML file that needs nothing else."""
        sections = [*self.sections, self._about]
        # The place in the page makes names unique, whatever the titles are.
        names = [f"{place}-{anchor(s.title)}" for place, s in enumerate(sections, 1)]
        pairs = list(zip(sections, names, strict=True))
        links = (element("a", s.title, href=f"#{name}") for s, name in pairs)
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", self.title),
            element("style", Markup(_style())),
        )
        body = element(
            "body",
            _HATCH,
            element("header", element("h1", self.title), element("p", self.lead, class_="lead")),
            element("nav", *links),
            element(
                "main",
                *(block.html() for block in self.summary),
                *(section.html(name=name) for section, name in pairs),
            ),
        )
        return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"

    def markdown(self, figures: str = "") -> str:
        """Write it as Markdown.

        Args:
            figures: the folder of the drawings as the file sees it; empty leaves drawings out.
        """
        blocks = [*self.summary, *self.sections, self._about]
        inner = (block.markdown(figures) for block in blocks)
        parts = [f"# {escaped(self.title)}", escaped(self.lead), *inner]
        return "\n\n".join(filter(None, parts)) + "\n"

    def write_markdown(self, path: Path) -> None:
        """Write it as Markdown, and its drawings as SVG files in a folder beside it.

        Args:
            path: of the file; the folder has its name without the ending. Existing files are
                replaced, and drawings removed that the file it replaces showed and this one does not.
        """
        folder = path.parent / path.stem
        figures = list(self._figures([*self.summary, *self.sections]))
        for figure in figures:
            write_text(figure.drawing(_style()), folder / figure.file)
        before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        shown = re.findall(rf"\]\({re.escape(path.stem)}/([\w.-]+\.svg)\)", before)
        for name in set(shown) - {figure.file for figure in figures}:
            (folder / name).unlink(missing_ok=True)
        write_text(self.markdown(path.stem), path)

    def _figures(self, blocks: Sequence[Block]) -> Iterator[Charts]:
        for block in blocks:
            if isinstance(block, Section):
                yield from self._figures(block.blocks)
            elif isinstance(block, Charts) and block.name:
                yield block

    @property
    def _about(self) -> Section:
        return Section("How this was measured", [Facts(self.facts)])


def write_text(text: str, path: Path) -> None:
    """Write a file whole or not at all; its folder is created.

    Args:
        text: of the file.
        path: where to; an existing file is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A new file of a name that nobody can have made a link of before.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    part = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def command_text(arguments: Sequence[str]) -> str:
    """Return a command line as one would type it: programs by their names, without their folders.

    Args:
        arguments: those of ``sys.orig_argv``; none where nothing is known.
    """
    if not arguments:
        return "not recorded"
    # An installed command is the interpreter and a script.
    programs = 1 + (len(arguments) > 1 and not arguments[1].startswith("-"))
    names = [Path(argument).name for argument in arguments[:programs]]
    return shlex.join([*names, *arguments[programs:]])


def _style() -> str:
    return (resources.files(__package__) / "style.css").read_text(encoding="utf-8")
