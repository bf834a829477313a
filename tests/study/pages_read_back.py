"""Reads pages back: what a browser would show, and what it would have to load."""

from __future__ import annotations

import re
from xml.etree import ElementTree

EXTERNAL = re.compile(r"https?:|//|@import|<script|<link|<img|<iframe", re.IGNORECASE)


def parsed(html: str) -> ElementTree.Element:
    """The page as a tree, which has to be well-formed, and complete in itself."""
    doctype, _, rest = html.partition("\n")
    assert doctype == "<!doctype html>"
    assert not EXTERNAL.search(html)
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {"#hatch"}
    page = ElementTree.fromstring(rest)
    names = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
    assert len(names) == len(set(names))
    links = [link.attrib["href"] for link in page.iter("a")]
    assert {link.removeprefix("#") for link in links} <= set(names)
    return page


def text_of(element: ElementTree.Element) -> str:
    """All text within an element, with single spaces."""
    return " ".join(" ".join(element.itertext()).split())


def tables(page: ElementTree.Element) -> list[list[list[str]]]:
    """The text of each cell of each row of each table."""
    return [
        [[text_of(cell) for cell in row] for row in table.iter("tr")]
        for table in page.iter("table")
    ]


def drawings(page: ElementTree.Element) -> list[ElementTree.Element]:
    """The charts, without swatches and patterns."""
    return [
        svg
        for svg in page.iter("svg")
        if svg.find("title") is not None and svg.find("text") is not None
    ]
