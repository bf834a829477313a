"""A run as tables for people and as JSON for the record."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.environment import Environment
from benchmarks.measure import CaseResult, CopyBandwidth, PeerResult
from benchmarks.summary import summaries
from benchmarks.table import Line, Table
from benchmarks.targets import COPY, Target, Verdict, judge
from benchmarks.timer import Timing, ratio

SCHEMA = 3

# One-minute load average above which a machine is called busy.
QUIET_LOAD = 0.7


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
        rehearsal: whether emulated kernels ran, so that no time means anything and no floor is
            judged.
        command_line: how the process was started.
    """

    environment: Environment
    quick: bool
    bandwidth: CopyBandwidth
    bandwidth_buffer_bytes: int
    results: tuple[CaseResult, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    rehearsal: bool = False
    command_line: tuple[str, ...] = ()

    @property
    def verdicts(self) -> list[Verdict]:
        """One per target of the device."""
        return judge(() if self.rehearsal else self.results, self.environment.device)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1.0 else f"{seconds * 1e3:.0f}"


def _throughput(result: CaseResult) -> tuple[str, str, str]:
    share = result.share_of_copy
    if result.case.host_cost or share is None:
        return "-", f"{result.nanoseconds_per_tensor:,.0f} ns", "-"
    megabytes = result.case.floor_bytes / 1e6
    moved = f"{megabytes:,.{0 if megabytes >= 10 else 2}f}"
    return moved, f"{result.gigabytes_per_second:,.1f}", f"{100.0 * share:.0f} %"


def cases_table(results: Iterable[CaseResult], where: str) -> Table:
    """The measurements on `where`: a heading per operation, a line per peer."""
    table = Table(
        f"steadygrad beside torch, {where}",
        ("case", "peer"),
        ("ours ms", "peer ms", "ratio", "MB", "GB/s", "of copy"),
    )
    groups: dict[str, list[CaseResult]] = {}
    for result in results:
        groups.setdefault(result.case.group, []).append(result)
    for members in groups.values():
        case = members[0].case
        table.add(Line(case.title, "bold"), Line(case.floor, "dim"))
        for result in members:
            _add_case(table, result)
        for line, summary in enumerate(summaries(members) if len(members) > 1 else ()):
            table.add(
                Line(f"  geometric mean of {summary.cases}" if line == 0 else "", "bold"),
                summary.peer,
                "",
                "",
                Line(f"{summary.mean:.2f}", "bold"),
            )
    return table


def _add_case(table: Table, result: CaseResult) -> None:
    moved, speed, share = _throughput(result)
    clock = ", wall" if result.ours.device and result.clock == "wall" else ""
    for line, peer in enumerate(result.peers):
        first = line == 0
        table.add(
            f"  {result.case.subject}{clock}" if first else "",
            peer.timing.name,
            _milliseconds(result.ours.median) if first else "",
            _milliseconds(peer.timing.median),
            f"{peer.ratio:.2f}",
            moved if first else "",
            speed if first else "",
            share if first else "",
        )


def _amount(target: Target, value: float) -> str:
    return f"{100 * value:.0f} %" if target.peer == COPY else f"{value:.3g} x"


def targets_table(verdicts: list[Verdict]) -> Table:
    """The floors and whether this run met them."""
    table = Table("Floors", ("case", "peer"), ("at least", "measured", "verdict"))
    words = {True: ("met", "green"), False: ("NOT MET", "bold red"), None: ("not run", "dim")}
    for verdict in verdicts:
        target = verdict.target
        word, style = words[verdict.met]
        if 0 < verdict.cases < verdict.of:
            word = f"{verdict.cases} of {verdict.of} run"
        table.add(
            target.name,
            target.peer,
            _amount(target, target.at_least),
            "-" if verdict.ratio is None else _amount(target, verdict.ratio),
            Line(word, style),
        )
    return table


def _notes(run: Run) -> list[str]:
    machine, bandwidth, gpu = run.environment, run.bandwidth, run.environment.gpu
    cache = machine.cache_bytes / 2**20
    lines = [
        f"{machine.cpu}, {machine.cores} cores, "
        + (f"last-level cache {cache:.0f} MiB, " if gpu is None else "")
        + f"torch {machine.torch}, steadygrad {machine.steadygrad}",
        f"source: {machine.revision}, kernels {machine.csrc_tree} ({machine.csrc_state})",
    ]
    if gpu is not None:
        lines += [
            f"{gpu.name}, {gpu.architecture}, L2 {cache:.0f} MiB, driver {gpu.driver}, CUDA: torch "
            f"{gpu.torch_cuda}, kernels {gpu.kernels_runtime}, nvcc {gpu.nvcc}",
            "Times are GPU time between two events; those marked wall are the time of a step in a "
            "loop that waits for the GPU at its end. The JSON has both for every case.",
        ]
    scaled = "" if bandwidth.scale is None else f", mul_ {bandwidth.scale:.1f} GB/s"
    lines += [
        f"copy bandwidth: copy_ {bandwidth.copy:,.1f} GB/s{scaled} on buffers of "
        f"{run.bandwidth_buffer_bytes / 2**20:,.0f} MiB; shares are of "
        f"{'this' if bandwidth.scale is None else 'the larger'}, measured again in the rounds of "
        "each case",
        "GB/s = floor bytes / time: what our path has to move with no help from caches. "
        "A second pass that finds data in cache can exceed 100 %.",
    ]
    host = [result for result in run.results if result.case.host_cost]
    if host:
        largest = max(result.case.working_set_bytes for result in host) / 2**20
        lines.append(
            f"Cases in ns, per tensor, fit in cache (up to {largest:.1f} MiB) and show the cost of "
            "a call, not of memory. All others start with cold buffers in every round."
        )
    if machine.load > QUIET_LOAD:
        lines.append(
            f"The machine was busy when this run began (load {machine.load:.1f}): neither times "
            "nor ratios count, measure again on a quiet one."
        )
    lines.extend(f"skipped {key}: {reason}" for key, reason in run.skipped)
    for result in run.results:
        lines.extend(f"peer missing in {result.case.key}: {why}" for why in result.unavailable)
    return lines


def _where(run: Run) -> str:
    if run.rehearsal:
        return "rehearsal with emulated kernels: no time here means anything"
    if run.environment.gpu is not None:
        return run.environment.gpu.name
    return f"{run.environment.threads} thread{'s' * (run.environment.threads != 1)}"


def render(run: Run, with_targets: bool = False) -> list[Table | Line]:
    """All tables and notes of a run, in order, to print one after the other; the floors for maintainers."""
    return [
        cases_table(run.results, _where(run)),
        *(Line(line, "dim") for line in _notes(run)),
        *((Line(""), targets_table(run.verdicts)) if with_targets else ()),
    ]


def _timing(timing: Timing) -> dict[str, Any]:
    lower, upper = timing.quartiles
    return {
        "name": timing.name,
        "rounds": len(timing.seconds),
        "median_seconds": timing.median,
        "lower_quartile_seconds": lower,
        "upper_quartile_seconds": upper,
        **_clocks(timing),
    }


def _clocks(timing: Timing) -> dict[str, float]:
    if not timing.device:
        return {}
    return {
        f"{clock}_median_seconds": timing.counting(clock).median for clock in ("wall", "device")
    }


def _peer(peer: PeerResult, ours: Timing) -> dict[str, Any]:
    both = {
        f"{clock}_ratio": ratio(peer.timing.counting(clock), ours.counting(clock))
        for clock in ("wall", "device")
        if ours.device
    }
    return {
        **_timing(peer.timing),
        "ratio": peer.ratio,
        **both,
        "round_ratio": peer.round_ratio,
        "round_ratio_quartiles": list(peer.round_ratio_quartiles),
    }


def _bandwidth(bandwidth: CopyBandwidth) -> dict[str, float | None]:
    return {
        "copy_gigabytes_per_second": bandwidth.copy,
        "mul_gigabytes_per_second": bandwidth.scale,
        "yardstick_gigabytes_per_second": bandwidth.yardstick,
    }


def _case(result: CaseResult, cache_bytes: int) -> dict[str, Any]:
    case = result.case
    return {
        "key": case.key,
        "operation": case.title,
        "shapes": case.subject,
        "tensors": case.tensors,
        "elements": case.elements,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes_per_element": case.bytes_per_element,
        "floor_bytes": case.floor_bytes,
        "working_set_bytes": case.working_set_bytes,
        "fits_cache": case.working_set_bytes <= cache_bytes,
        "averaged": case.averaged,
        "cold_buffers": not case.host_cost,
        "buffer_sets": result.buffer_sets,
        "clock": result.clock,
        "copy_bandwidth": None if result.bandwidth is None else _bandwidth(result.bandwidth),
        "gigabytes_per_second": result.gigabytes_per_second,
        "share_of_copy": result.share_of_copy,
        "nanoseconds_per_tensor": result.nanoseconds_per_tensor,
        "ours": _timing(result.ours),
        "peers": [_peer(peer, result.ours) for peer in result.peers],
        "unavailable": list(result.unavailable),
    }


def to_json(run: Run) -> dict[str, Any]:
    """The run as plain JSON values; `schema` goes up when a key changes its meaning."""
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command_line": list(run.command_line),
        "quick": run.quick,
        "rehearsal": run.rehearsal,
        "environment": dataclasses.asdict(run.environment),
        "copy_bandwidth": {
            **_bandwidth(run.bandwidth),
            "buffer_bytes": run.bandwidth_buffer_bytes,
        },
        "cases": [_case(result, run.environment.cache_bytes) for result in run.results],
        "summaries": [dataclasses.asdict(summary) for summary in summaries(run.results)],
        "targets": [
            {
                "case": verdict.target.name,
                "peer": verdict.target.peer,
                "at_least": verdict.target.at_least,
                "measured": verdict.ratio,
                "met": verdict.met,
                "cases": verdict.cases,
                "of": verdict.of,
            }
            for verdict in run.verdicts
        ],
        "skipped": [{"case": key, "reason": reason} for key, reason in run.skipped],
    }
