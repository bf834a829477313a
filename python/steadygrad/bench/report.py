"""A run as tables for people and as JSON for the record."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from steadygrad.bench.environment import Environment
from steadygrad.bench.measure import CaseResult, CopyBandwidth, working_set_bytes
from steadygrad.bench.targets import Verdict, judge
from steadygrad.bench.timer import Timing

SCHEMA = 1

# One-minute load average above which a machine is called busy.
_QUIET_LOAD = 0.7


@dataclass(frozen=True)
class Run:
    """Everything that one run of the benchmark found.

    Attributes:
        environment: machine and software.
        quick: whether only the quick cases ran.
        bandwidth: the copy bandwidth measured before the first case.
        bandwidth_buffer_bytes: size of the buffers that it was measured on.
        results: one per case, in table order.
        skipped: (case key, reason) of cases that did not run.
    """

    environment: Environment
    quick: bool
    bandwidth: CopyBandwidth
    bandwidth_buffer_bytes: int
    results: tuple[CaseResult, ...]
    skipped: tuple[tuple[str, str], ...] = ()


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1.0 else f"{seconds * 1e3:.0f}"


def _throughput(result: CaseResult) -> tuple[str, str]:
    share = result.share_of_copy
    if share is None:
        return f"{result.nanoseconds_per_tensor:,.0f} ns", "-"
    return f"{result.gigabytes_per_second:.1f}", f"{100.0 * share:.0f} %"


def cases_table(results: Iterable[CaseResult], threads: int) -> Table:
    """The measurements: a heading per operation, a line per peer."""
    title = f"steadygrad beside torch, {threads} thread{'s' * (threads != 1)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    table.add_column("peer")
    for heading in ("ours ms", "peer ms", "ratio", "GB/s", "of copy"):
        table.add_column(heading, justify="right")
    previous = None
    for result in results:
        operation = result.case.operation
        if operation.key != previous:
            table.add_section()
            table.add_row(
                Text(operation.title, style="bold"),
                Text(f"moves {operation.bytes_per_element} B/element", style="dim"),
            )
            previous = operation.key
        speed, share = _throughput(result)
        for line, peer in enumerate(result.peers):
            first = line == 0
            table.add_row(
                f"  {result.case.model.title}" if first else "",
                peer.timing.name,
                _milliseconds(result.ours.median) if first else "",
                _milliseconds(peer.timing.median),
                f"{peer.ratio:.2f}",
                speed if first else "",
                share if first else "",
            )
    return table


def targets_table(verdicts: list[Verdict]) -> Table:
    """The floors and whether this run met them."""
    table = Table(title="Floors", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("case", "peer"):
        table.add_column(heading)
    for heading in ("at least", "measured"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    words = {True: ("met", "green"), False: ("NOT MET", "bold red"), None: ("not run", "dim")}
    for verdict in verdicts:
        word, style = words[verdict.met]
        table.add_row(
            verdict.target.case,
            verdict.target.peer,
            f"{verdict.target.at_least:g} x",
            "-" if verdict.ratio is None else f"{verdict.ratio:.2f} x",
            Text(word, style=style),
        )
    return table


def _notes(run: Run) -> list[str]:
    machine, bandwidth = run.environment, run.bandwidth
    cache = machine.cache_bytes / 2**20
    lines = [
        f"{machine.cpu}, {machine.cores} cores, last-level cache {cache:.0f} MiB, "
        f"torch {machine.torch}, steadygrad {machine.steadygrad}",
        f"copy bandwidth: copy_ {bandwidth.copy:.1f} GB/s, mul_ {bandwidth.scale:.1f} GB/s "
        f"on buffers of {run.bandwidth_buffer_bytes / 2**20:.0f} MiB; "
        "shares are of the larger, measured again in the rounds of each case",
        "GB/s = floor bytes / time: what our path has to move with no help from caches. "
        "A second pass that finds data in cache can exceed 100 %.",
    ]
    host = [result for result in run.results if result.case.host_cost]
    if host:
        largest = max(working_set_bytes(result.case) for result in host) / 2**20
        lines.append(
            f"Cases in ns, per tensor, fit in cache (up to {largest:.1f} MiB) and show the cost of "
            "a call, not of memory. All others start with cold buffers in every round."
        )
    if machine.load > _QUIET_LOAD:
        lines.append(
            f"The machine was busy when this run began (load {machine.load:.1f}): neither times "
            "nor ratios count, measure again on a quiet one."
        )
    lines.extend(f"skipped {key}: {reason}" for key, reason in run.skipped)
    return lines


def render(run: Run) -> RenderableType:
    """All tables and notes of a run, for a rich console."""
    notes = [Text(line, style="dim") for line in _notes(run)]
    return Group(
        cases_table(run.results, run.environment.threads),
        *notes,
        Text(),
        targets_table(judge(run.results)),
    )


def _timing(timing: Timing) -> dict[str, Any]:
    lower, upper = timing.quartiles
    return {
        "name": timing.name,
        "rounds": len(timing.seconds),
        "median_seconds": timing.median,
        "lower_quartile_seconds": lower,
        "upper_quartile_seconds": upper,
    }


def _bandwidth(bandwidth: CopyBandwidth) -> dict[str, float]:
    return {
        "copy_gigabytes_per_second": bandwidth.copy,
        "mul_gigabytes_per_second": bandwidth.scale,
        "yardstick_gigabytes_per_second": bandwidth.yardstick,
    }


def _case(result: CaseResult, cache_bytes: int) -> dict[str, Any]:
    case = result.case
    return {
        "key": case.key,
        "operation": case.operation.title,
        "shapes": case.model.title,
        "tensors": case.model.tensors,
        "elements": case.model.elements,
        "dtype": "float32",
        "bytes_per_element": case.operation.bytes_per_element,
        "floor_bytes": result.floor_bytes,
        "working_set_bytes": working_set_bytes(case),
        "fits_cache": working_set_bytes(case) <= cache_bytes,
        "cold_buffers": not case.host_cost,
        "copy_bandwidth": None if result.bandwidth is None else _bandwidth(result.bandwidth),
        "gigabytes_per_second": result.gigabytes_per_second,
        "share_of_copy": result.share_of_copy,
        "nanoseconds_per_tensor": result.nanoseconds_per_tensor,
        "ours": _timing(result.ours),
        "peers": [
            {
                **_timing(peer.timing),
                "ratio": peer.ratio,
                "round_ratio": peer.round_ratio,
                "round_ratio_quartiles": list(peer.round_ratio_quartiles),
            }
            for peer in result.peers
        ],
    }


def to_json(run: Run) -> dict[str, Any]:
    """The run as plain JSON values; `schema` goes up when a key changes its meaning."""
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": run.quick,
        "environment": dataclasses.asdict(run.environment),
        "copy_bandwidth": {
            **_bandwidth(run.bandwidth),
            "buffer_bytes": run.bandwidth_buffer_bytes,
        },
        "cases": [_case(result, run.environment.cache_bytes) for result in run.results],
        "targets": [
            {
                "case": verdict.target.case,
                "peer": verdict.target.peer,
                "at_least": verdict.target.at_least,
                "measured": verdict.ratio,
                "met": verdict.met,
            }
            for verdict in judge(run.results)
        ],
        "skipped": [{"case": key, "reason": reason} for key, reason in run.skipped],
    }
