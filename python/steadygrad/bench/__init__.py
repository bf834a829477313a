"""`python -m steadygrad bench`: our operations side by side with torch's, in one process.

One module per role: `shapes` (what models look like), `workload` (buffers), `ours` and `peers` (the
candidates), `cases` (what is measured), `timer` (interleaved laps), `measure` (derived numbers,
copy bandwidth), `targets` (floors), `environment` and `report`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from steadygrad.bench.cases import CASES, Case
from steadygrad.bench.environment import available_memory_bytes, this_machine
from steadygrad.bench.measure import (
    FULL,
    QUICK,
    CopyYardstick,
    measure_case,
    memory_needed,
    settle_allocator,
)
from steadygrad.bench.report import Run, render, to_json

__all__ = ["run"]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Heartbeat:
    """Redraws the progress bar between rounds, a few times a second at most.

    The bar's own refresh thread would wake up inside timed regions.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._last = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last > 0.5:
            self._progress.refresh()
            self._last = now


def _measure_all(console: Console, *, quick: bool) -> Run:
    machine = this_machine()
    effort = QUICK if quick else FULL
    chosen: list[Case] = []
    skipped: list[tuple[str, str]] = []
    settle_allocator()
    yardstick = CopyYardstick(machine.cache_bytes)
    free = available_memory_bytes()
    for case in CASES:
        if quick and not case.quick:
            continue
        needed = memory_needed(case)
        if needed > free:
            reason = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB available"
            skipped.append((case.key, reason))
        else:
            chosen.append(case)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    heartbeat = _Heartbeat(progress)
    results = []
    with progress:
        task = progress.add_task("copy bandwidth", total=len(chosen))
        progress.refresh()
        bandwidth = yardstick.measure(QUICK)
        for case in chosen:
            progress.update(task, description=case.key)
            progress.refresh()
            results.append(measure_case(case, effort, yardstick, heartbeat))
            progress.advance(task)
    return Run(machine, quick, bandwidth, yardstick.buffer_bytes, tuple(results), tuple(skipped))


def run(console: Console, *, quick: bool, out: Path | None, threads: int | None) -> int:
    """Measure, print the tables, and write the numbers.

    Args:
        console: where the progress bar and the tables go.
        quick: only the cases of the short table, under a minute; otherwise all, about six.
        out: file for the numbers as JSON; its folder is created. None writes nothing.
        threads: threads for torch and steadygrad alike; None takes two, or one on a single core.

    Returns:
        0. A floor that is missed is shown, not an error: it may be the machine.

    Raises:
        ValueError: `threads` is less than 1.
    """
    count = min(2, os.cpu_count() or 1) if threads is None else threads
    if count < 1:
        raise ValueError(f"bench: threads must be at least 1, got {threads}")
    with _threads(count):
        found = _measure_all(console, quick=quick)
    console.print(render(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(to_json(found), indent=2) + "\n", encoding="utf-8")
        console.print(f"Numbers written to {out}")
    return 0
