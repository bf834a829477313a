"""Show a result as rich tables for the terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich import box
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from benchmarks.results import COPY, Result, operations

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html.jinja"]),
    trim_blocks=True,
)


def milliseconds(timing: Result) -> str:
    """Return a median in milliseconds with three digits."""
    value = timing["median_seconds"] * 1e3
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def subject(case: Result) -> str:
    """Return the name of a case's shapes; wall time is marked on a device that has its own clock."""
    wall = "wall_median_seconds" in case["ours"] and case["clock"] == "wall"
    return f"{case['shapes']}{', wall' if wall else ''}"


def floor(cases: Sequence[Result]) -> str:
    """Return a sentence that says what the cases of an operation have to move per element."""
    floors = sorted({case["bytes_per_element"] for case in cases})
    return f"Floor: {' or '.join(f'{floor:g}' for floor in floors)} B an element"


def moved(case: Result) -> list[str]:
    """Return megabytes, GB/s and the share of the copy bandwidth; dashes for cases of host cost."""
    megabytes, share = case["floor_bytes"] / 1e6, case["share_of_copy"]
    if not case["cold_buffers"] or share is None:
        return ["-", "-", "-"]
    digits = 0 if megabytes >= 10 else 2
    speed = f"{case['gigabytes_per_second']:,.0f}"
    return [f"{megabytes:,.{digits}f}", speed, f"{100 * share:.0f} %"]


def _table(title: str, names: str, *numbers: str) -> Table:
    columns = [Column(heading, justify="right", no_wrap=True) for heading in numbers]
    first = Column(names, no_wrap=True)
    return Table(first, *columns, title=title, title_justify="left", box=box.SIMPLE)


def cases_table(result: Result, where: str) -> Table:
    """Return the table of measurements: operations, their cases, and the peers of each case.

    All names share one column, so that the table fits in 80 columns.
    """
    headings = ("ours, and torch's below", "ms", "ratio", "MB", "GB/s", "of copy")
    table = _table(f"steadygrad beside torch, {where}", *headings)
    for operation, cases in operations(result["cases"]).items():
        table.add_section()
        table.add_row(Text(operation, "bold"))
        for case in cases:
            megabytes, speed, share = moved(case)
            if not case["cold_buffers"]:
                speed = f"{case['nanoseconds_per_tensor']:,.0f} ns"
            ours = milliseconds(case["ours"])
            table.add_row(f" {subject(case)}", ours, "", megabytes, speed, share)
            for peer in case["peers"]:
                ratio = Text(f"{peer['ratio']:.2f}", "green" if peer["ratio"] >= 1 else "red")
                table.add_row(f"   {peer['name']}", milliseconds(peer), ratio)
        for mean in result["summaries"]:
            if mean["title"] == operation and mean["cases"] > 1:
                name = f" mean of {mean['cases']}: {mean['peer']}"
                table.add_row(Text(name, "bold"), "", Text(f"{mean['mean']:.2f}", "bold"))
    return table


def amount(target: Result, value: float | None) -> str:
    """Format a value of a target: times as fast, or a share of the copy bandwidth."""
    if value is None:
        return "-"
    return f"{100 * value:.0f} %" if target["peer"] == COPY else f"{value:.3g} x"


def verdict(target: Result) -> str:
    """Return a word that says whether a floor was met."""
    if 0 < target.get("cases", 0) < target.get("of", 1):
        return f"{target['cases']} of {target['of']} run"
    return {True: "met", False: "NOT MET", None: "not run"}[target["met"]]


def targets_table(result: Result) -> Table:
    """Return the table of floors, with whether this run met them, for maintainers."""
    table = _table("Floors", "case, and the peers below", "at least", "measured", "verdict")
    for case, targets in groupby(result["targets"], lambda target: target["case"]):
        table.add_row(Text(case, "bold"))
        for target in targets:
            amounts = (amount(target, target[name]) for name in ("at_least", "measured"))
            style = "bold red" if target["met"] is False else ""
            table.add_row(f" {target['peer']}", *amounts, Text(verdict(target), style))
    return table


def notes(result: Result) -> list[str]:
    """Return notes on what was measured, what the figures mean, and what is missing."""
    template = TEMPLATES.get_template("notes.txt.jinja")
    return template.render({**result, "machine": result["environment"]}).splitlines()


def render(result: Result, targets: bool = False) -> list[RenderableType]:
    """Return all tables and notes of a result, in order; the floors only with `targets`."""
    environment = result["environment"]
    threads = environment["threads"]
    where = f"{threads} thread{'s' * (threads != 1)}"
    if environment.get("gpu"):
        where = environment["gpu"]["name"]
    if result.get("rehearsal"):
        where = "rehearsal with emulated kernels: no time here means anything"
    parts: list[RenderableType] = [cases_table({"summaries": [], **result}, where)]
    parts += [Text(note, "dim") for note in notes(result)]
    return [*parts, targets_table(result)] if targets else parts


def show(console: Console, parts: Iterable[RenderableType]) -> None:
    """Print tables and notes; tables wider than the console are printed in full width."""
    for part in parts:
        width = console.width
        if isinstance(part, Table):
            wide = console.options.update(width=1000)
            console.width = max(width, console.measure(part, options=wide).maximum)
        console.print(part)
        console.width = width
