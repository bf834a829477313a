"""Self-contained pages: what the benchmark and the study found, as one HTML file or as Markdown.

A :class:`Document` is made of blocks of text, tables and charts. Its HTML carries its style and its
drawings (SVG) with it, runs no script and loads nothing; colours never stand alone. Its Markdown
has the same text and tables, and the charts as SVG files.
"""

from __future__ import annotations

from .bar_chart import Bar, bar_chart
from .blocks import Block, Bullets, Cell, Charts, Facts, Paragraph, Section, Table
from .document import Document, command_text, write_text
from .drawing import number
from .line_chart import Line, Plot, line_chart, swatch
from .markup import Markup
from .record_file import read_record
from .scale import Scale

__all__ = [
    "Bar",
    "Block",
    "Bullets",
    "Cell",
    "Charts",
    "Document",
    "Facts",
    "Line",
    "Markup",
    "Paragraph",
    "Plot",
    "Scale",
    "Section",
    "Table",
    "bar_chart",
    "command_text",
    "line_chart",
    "number",
    "read_record",
    "swatch",
    "write_text",
]
