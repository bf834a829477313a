"""A result as rich tables for the terminal, and as Markdown tables for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.results import COPY, Result, operations

# One-minute load average above which a machine is called busy.
QUIET_LOAD = 0.7


def milliseconds(timing: Result) -> str:
    """Return a median to three digits."""
    value = timing["median_seconds"] * 1e3
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def subject(case: Result) -> str:
    """Name what a case is measured on; wall time is marked on a device that has a clock of its own."""
    wall = "wall_median_seconds" in case["ours"] and case["clock"] == "wall"
    return f"{case['shapes']}{', wall' if wall else ''}"


def floor(cases: Sequence[Result]) -> str:
    """Say what the cases of an operation have to move per element."""
    floors = sorted({case["bytes_per_element"] for case in cases})
    return f"Floor: {' or '.join(f'{floor:g}' for floor in floors)} B an element"


def moved(case: Result) -> tuple[str, str, str]:
    """Return megabytes, GB/s and the share of the copy bandwidth, or for cases of host cost dashes."""
    megabytes, share = case["floor_bytes"] / 1e6, case["share_of_copy"]
    if not case["cold_buffers"] or share is None:
        return "-", "-", "-"
    amount = f"{megabytes:,.{0 if megabytes >= 10 else 2}f}"
    return amount, f"{case['gigabytes_per_second']:,.0f}", f"{100 * share:.0f} %"


def _table(title: str, names: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column(names, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def cases_table(result: Result, where: str) -> Table:
    """Make the table of measurements: an operation, its cases below, and below each case its peers.

    Names stand in one column, so that all fits in 80 columns.
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


def _amount(target: Result, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.0f} %" if target["peer"] == COPY else f"{value:.3g} x"


def _verdict(target: Result) -> str:
    if 0 < target.get("cases", 0) < target.get("of", 1):
        return f"{target['cases']} of {target['of']} run"
    return {True: "met", False: "NOT MET", None: "not run"}[target["met"]]


def targets_table(result: Result) -> Table:
    """Make the table of floors and whether this run met them, for maintainers."""
    table = _table("Floors", "case, and the peers below", "at least", "measured", "verdict")
    for case, targets in groupby(result["targets"], lambda target: target["case"]):
        table.add_row(Text(case, "bold"))
        for target in targets:
            amounts = (_amount(target, target[name]) for name in ("at_least", "measured"))
            style = "bold red" if target["met"] is False else ""
            table.add_row(f" {target['peer']}", *amounts, Text(_verdict(target), style))
    return table


def notes(result: Result) -> Iterator[str]:
    """Say what the figures are of, what they mean, and what is missing."""
    machine, bandwidth = result["environment"], result["copy_bandwidth"]
    gpu, cache = machine.get("gpu"), machine["cache_bytes"] / 2**20
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, "
        + ("" if gpu else f"last-level cache {cache:.0f} MiB, ")
        + f"torch {machine['torch']}, steadygrad {machine['steadygrad']}, {result['created']}"
    )
    tree, state = machine.get("csrc_tree", "unknown"), machine.get("csrc_state", "unknown")
    yield f"Source: {machine.get('revision') or 'unknown'}, kernels {tree} ({state})."
    if gpu:
        yield (
            f"{gpu['name']}, {gpu['architecture']}, {gpu['multiprocessors']} multiprocessors, L2 "
            f"{cache:.0f} MiB, driver {gpu['driver']}; CUDA: torch {gpu['torch_cuda']}, kernels "
            f"{gpu['kernels_runtime']}, nvcc {gpu['nvcc']}"
        )
        yield (
            "Times are GPU time between two events; those marked wall are the time of a step in a "
            "loop that waits for the GPU at its end. The JSON has both for every case."
        )
    scaled = bandwidth["mul_gigabytes_per_second"]
    yield (
        f"Copy bandwidth: copy_ {bandwidth['copy_gigabytes_per_second']:,.1f} GB/s"
        + ("" if scaled is None else f", mul_ {scaled:,.1f} GB/s")
        + f" on buffers of {bandwidth['buffer_bytes'] / 2**20:,.0f} MiB; shares are of the larger, "
        "measured again in the rounds of each case."
    )
    yield (
        "A ratio says how many times as fast as the peer ours is. GB/s are floor bytes over time: "
        "what our path has to move with no help from caches. A second pass that finds data in "
        "cache can exceed 100 %."
    )
    if any(not case["cold_buffers"] for case in result["cases"]):
        yield (
            "Cases in ns, per tensor, fit in cache and show the cost of a call, not of memory. "
            "All others start with cold buffers in every round."
        )
    if machine["load"] > QUIET_LOAD:
        yield (
            f"The machine was busy when this run began (load {machine['load']:.1f}): neither times "
            "nor ratios count, measure again on a quiet one."
        )
    yield from (f"skipped {entry['case']}: {entry['reason']}" for entry in result["skipped"])
    for case in result["cases"]:
        for why in case.get("unavailable", ()):
            yield f"peer missing in {case['key']}: {why}"


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
    """Print tables and notes; a console that is narrower than a table is taken to be as wide."""
    for part in parts:
        width = console.width
        if isinstance(part, Table):
            wide = console.options.update(width=1000)
            console.width = max(width, console.measure(part, options=wide).maximum)
        console.print(part)
        console.width = width


def markdown(headings: Sequence[str], numbers: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table, in which the columns under `numbers` end at the right."""
    right = set(numbers)
    rule = ("---:" if heading in right else "---" for heading in headings)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, tuple(rule), *rows))


def operation_markdown(cases: Sequence[Result]) -> str:
    """Write a line per case and peer of one operation."""
    rows = []
    for case in cases:
        cells: tuple[str, ...] = (subject(case), milliseconds(case["ours"]), *moved(case))
        for peer in case["peers"]:
            rows.append((*cells, peer["name"], milliseconds(peer), f"{peer['ratio']:.2f}"))
            cells = ("",) * len(cells)
    headings = ("shapes", "ours ms", "MB", "GB/s", "of copy", "against", "ms", "ratio")
    return markdown(headings, ("ours ms", "MB", "GB/s", "of copy", "ms", "ratio"), rows)


def targets_markdown(targets: Sequence[Result]) -> str:
    """Write the floors, and whether the run met them."""
    rows = (
        (
            target["case"],
            target["peer"],
            _amount(target, target["at_least"]),
            _amount(target, target["measured"]),
            _verdict(target).replace("NOT MET", "**missed**"),
        )
        for target in targets
    )
    return markdown(("case", "against", "at least", "measured", "verdict"), (), rows)
