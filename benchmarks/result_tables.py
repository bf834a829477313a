"""What a result file says, as tables: for `bench --page` and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.targets import COPY
from study.pages import Cell, Table

# A result file, a case or a summary of it, as JSON has it.
Result = dict[str, Any]


def operations(result: Result) -> dict[str, list[Result]]:
    """The cases of a result by the name of their operation, in their order."""
    found: dict[str, list[Result]] = {}
    for case in result["cases"]:
        found.setdefault(case["operation"], []).append(case)
    return found


def means(result: Result, operation: str) -> list[Result]:
    """The summaries of one operation; none in files that are older than summaries."""
    return [s for s in result.get("summaries", ()) if s["title"] == operation]


def floor(cases: Sequence[Result]) -> str:
    """What the cases of an operation have to move per element."""
    # Where dtypes are mixed, so are the bytes an element has to move, and a column tells the sum.
    floors = sorted({case["bytes_per_element"] for case in cases})
    return f"Floor: {' or '.join(f'{floor:g}' for floor in floors)} B an element."


def means_sentence(summaries: Iterable[Result]) -> str:
    """The geometric means of an operation."""
    return f"Geometric means: {'; '.join(map(_mean, summaries))}."


def operation_table(cases: Sequence[Result], megabytes: bool) -> Table:
    """A line per case and peer.

    Args:
        cases: of one operation.
        megabytes: whether a column tells how much a case has to move.
    """
    rows = []
    for case in cases:
        share = case["share_of_copy"]
        per_call = not case["cold_buffers"]
        speed = "-" if per_call else f"{case['gigabytes_per_second']:,.0f}"
        part = "-" if per_call or share is None else f"{100 * share:.0f} %"
        moved = (_megabytes(case["floor_bytes"]),) if megabytes else ()
        shown = (f"{case['shapes']}{_clock(case)}", _milliseconds(case["ours"]), *moved)
        cells = (*shown, speed, part)
        for peer in case["peers"]:
            rows.append((*cells, peer["name"], _milliseconds(peer), f"{peer['ratio']:.2f}"))
            cells = ("",) * len(cells)
    moved_heading = ("MB",) if megabytes else ()
    return Table(
        ("shapes", "ours ms", *moved_heading, "GB/s", "of copy", "against", "ms", "ratio"),
        rows,
        "tnnn" + "n" * megabytes + "tnn",
        style="numbers",
    )


def targets_table(targets: Sequence[Result]) -> Table:
    """The floors, and whether the run met them."""
    verdicts = {True: Cell("met"), False: Cell("missed", strong=True), None: Cell("not run")}
    rows = []
    for target in targets:
        share = target["peer"] == COPY
        found = target["measured"]
        rows.append(
            (
                target["case"],
                target["peer"],
                _amount(target["at_least"], share),
                "-" if found is None else _amount(found, share),
                verdicts[target["met"]],
            )
        )
    return Table(("case", "against", "at least", "measured", "verdict"), rows, "ttttt")


def targets_sentence(targets: Sequence[Result]) -> str:
    """How many of the floors were met."""
    return f"Floors: {sum(t['met'] is True for t in targets)} of {len(targets)} met."


def _amount(value: float, share: bool) -> str:
    return f"{100 * value:.0f} %" if share else f"{value:.3g} x"


def _mean(summary: Result) -> str:
    return (
        f"{summary['mean']:.2f} against {summary['peer']} over {summary['cases']} cases, "
        f"at least {summary['least']:.2f} ({summary['least_case']})"
    )


def _megabytes(count: int) -> str:
    megabytes = count / 1e6
    return f"{megabytes:,.{0 if megabytes >= 10 else 2}f}"


def _milliseconds(timing: Result) -> str:
    return f"{timing['median_seconds'] * 1e3:.3g}"


def _clock(case: Result) -> str:
    """Marks cases whose wall time counts, on a device that has a clock of its own."""
    counts = "wall_median_seconds" in case["ours"] and case["clock"] == "wall"
    return ", wall" if counts else ""
