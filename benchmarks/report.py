"""Show results: tables for the terminal, an HTML page with a chart of ratios, docs/performance.md.

``make performance`` runs ``python -m benchmarks.report``, which writes docs/performance.md from the
newest result file of each machine.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich import box
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from benchmarks.environment import ROOT, git
from benchmarks.results import COPY, Result, machine_of, newest_results, operations
from study.record import write_text

PERFORMANCE = ROOT / "docs" / "performance.md"
# Lines of it that depend on the present kernels, and not on the result files alone, begin with this.
STALENESS = "**These figures are older than the kernels"
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


def table_of(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return an empty table with columns of names, and columns of numbers to the right of them."""
    columns = [Column(heading, no_wrap=True) for heading in names]
    columns += [Column(heading, justify="right", no_wrap=True) for heading in numbers]
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE)


def cases_table(result: Result, where: str) -> Table:
    """Return the table of measurements: operations, their cases, and the peers of each case.

    All names share one column, so that the table fits in 80 columns.
    """
    names, numbers = ("ours, and torch's below",), ("ms", "ratio", "MB", "GB/s", "of copy")
    table = table_of(f"steadygrad beside torch, {where}", names, numbers)
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
    numbers = ("at least", "measured", "verdict")
    table = table_of("Floors", ("case, and the peers below",), numbers)
    for case, targets in groupby(result["targets"], lambda target: target["case"]):
        table.add_row(Text(case, "bold"))
        for target in targets:
            amounts = (amount(target, target[name]) for name in ("at_least", "measured"))
            style = "bold red" if target["met"] is False else ""
            table.add_row(f" {target['peer']}", *amounts, Text(verdict(target), style))
    return table


def render(result: Result, targets: bool = False) -> list[RenderableType]:
    """Return the table of a result, and notes on what its figures mean and what is missing.

    With `targets` the table of floors comes last.
    """
    environment = result["environment"]
    threads = environment["threads"]
    where = f"{threads} thread{'s' * (threads != 1)}"
    if environment.get("gpu"):
        where = environment["gpu"]["name"]
    if result.get("rehearsal"):
        where = "rehearsal with emulated kernels: no time here means anything"
    parts: list[RenderableType] = [cases_table({"summaries": [], **result}, where)]
    notes = TEMPLATES.get_template("notes.txt.jinja").render({**result, "machine": environment})
    parts += [Text(note, "dim") for note in notes.splitlines()]
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


def write_page(result: Result, path: Path, targets: bool = False) -> None:
    """Write a result as one self-contained HTML file: a chart of ratios, and the terminal's tables."""
    text = Console(file=io.StringIO(), width=100, record=True)
    show(text, render(result, targets))
    page = TEMPLATES.get_template("page.html.jinja").render(
        title=f"steadygrad beside torch: {machine_of(result)}, {result['created'][:10]}",
        chart=ratio_chart(result),
        tables=text.export_text(),
    )
    write_text(page, path)


def ratio_chart(result: Result) -> str:
    """Draw a bar for each case and peer as SVG, with a panel per operation and one scale for all."""
    panels = {
        name: [(case, peer) for case in cases for peer in case["peers"]]
        for name, cases in operations(result["cases"]).items()
    }
    panels = {name: bars for name, bars in panels.items() if bars} or {"no case was measured": []}
    heights = [len(bars) + 3 for bars in panels.values()]
    drawing = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 0.2 * sum(heights) + 1), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
        for axis, (name, bars) in zip(axes.flat, panels.items(), strict=True):
            ratios = np.array([peer["ratio"] for _, peer in bars])
            edges = np.array([peer["round_ratio_quartiles"] for _, peer in bars]).reshape(-1, 2).T
            # The ratio of medians may lie outside the quartiles over rounds, and a whisker cannot have
            # a negative length.
            whiskers = np.maximum((ratios - edges[0], edges[1] - ratios), 0.0)
            labels = [f"{subject(case)}: {peer['name']}" for case, peer in bars]
            colours = ["tab:red" if ratio < 1 else "tab:blue" for ratio in ratios]
            rows = range(len(bars))
            axis.barh(rows, ratios - 1, left=1, xerr=whiskers, color=colours, ecolor="gray")
            axis.set(xscale="log", title=name, yticks=rows, yticklabels=labels)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.invert_yaxis()
        axes.flat[-1].set_xlabel("times as fast as the peer")
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    svg = drawing.getvalue()
    return svg[svg.index("<svg") :]


def performance(results: dict[str, Result], csrc_tree: str | None) -> str:
    """Return docs/performance.md.

    Args:
        results: Newest result of each machine.
        csrc_tree: Hash that git gives the kernels as they are now; None if git does not say.
    """
    gpus = {name: result for name, result in results.items() if result["environment"].get("gpu")}
    words = (operations, floor, subject, milliseconds, moved, amount, verdict)
    text = TEMPLATES.get_template("performance.md.jinja").render(
        gpus=gpus,
        machines={**gpus, **results},
        csrc_tree=csrc_tree,
        staleness=STALENESS,
        **{function.__name__: function for function in words},
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


if __name__ == "__main__":
    write_text(performance(newest_results(), git(ROOT, "rev-parse", "HEAD:csrc")), PERFORMANCE)
    sys.stdout.write(f"{PERFORMANCE.relative_to(ROOT)} written\n")
