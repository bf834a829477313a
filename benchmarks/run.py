"""Measures every case, shows a progress bar and the tables, and writes the numbers."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.device import DeviceUnusable, HostDevice, device_named
from benchmarks.measure import QUICK, measure_case, settle_allocator
from benchmarks.page import write_page
from benchmarks.report import Run, render, to_json
from benchmarks.table import Line, Table
from study.console import Console

# How the reason begins why a case was skipped that raised.
FAILED = "failed"

__all__ = ["DeviceUnusable", "measure_all", "run", "show"]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Silence:
    """Shows nothing."""

    def start(self, name: str) -> None:
        """A case begins."""

    def beat(self) -> None:
        """A round is over."""

    def finish(self) -> None:
        """A case is over."""


class _Bar(_Silence):
    """rich's progress bar, redrawn between rounds, a few times a second at most.

    The bar's own refresh thread would wake up inside timed regions.
    """

    def __init__(self, progress: Any, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("copy bandwidth", total=total)
        self._last = 0.0
        progress.refresh()

    def start(self, name: str) -> None:
        self._progress.update(self._task, description=name)
        self._progress.refresh()

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._last > 0.5:
            self._progress.refresh()
            self._last = now

    def finish(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[_Silence]:
    try:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        yield _Silence()
        return
    if not isinstance(console, RichConsole):
        yield _Silence()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        yield _Bar(progress, total)


def measure_all(
    console: Console,
    device: HostDevice,
    *,
    quick: bool,
    limit: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Measure the cases of one device.

    Args:
        console: where the progress bar goes.
        device: what is measured.
        quick: only the cases of the short table.
        limit: seconds after which no further case is begun; None has no limit.
        clock: the time in seconds; replaced in tests.

    Returns:
        What was found; cases that lacked memory or time, or failed, are among `skipped`.
    """
    began = clock()
    chosen: list[Case] = []
    skipped: list[tuple[str, str]] = []
    settle_allocator()
    yardstick = device.yardstick()
    free = device.free_bytes()
    for case in device.cases():
        if quick and not case.quick:
            continue
        needed = case.memory_needed(device.ground.sets(case))
        if needed > free:
            reason = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB available"
            skipped.append((case.key, reason))
        else:
            chosen.append(case)
    results = []
    with _progress(console, len(chosen)) as progress:
        alone = device.ground.race(yardstick.candidates)
        bandwidth = yardstick.measure(QUICK, alone)
        for case in chosen:
            if limit is not None and clock() - began > limit:
                skipped.append((case.key, f"the limit of {limit:g} s was reached"))
                continue
            progress.start(case.key)
            effort = device.effort(quick)
            try:
                results.append(measure_case(case, effort, yardstick, progress.beat, device.ground))
            except RuntimeError as error:  # the other cases' numbers are worth having
                skipped.append((case.key, f"{FAILED}: {error}"))
            device.release()
            progress.finish()
    return Run(
        device.environment,
        quick,
        bandwidth,
        yardstick.buffer_bytes,
        tuple(results),
        tuple(skipped),
        device.rehearsal,
        tuple(sys.orig_argv),
    )


def run(
    console: Console,
    *,
    quick: bool,
    out: Path | None,
    page: Path | None = None,
    threads: int | None,
    device: str = "cpu",
    limit: float | None = None,
    targets: bool = False,
) -> int:
    """Measure, print the tables, and write the numbers.

    Args:
        console: where the progress bar and the tables go.
        quick: only the cases of the short table, about a minute; otherwise all, about ten minutes
            on the CPU.
        out: file for the numbers as JSON; its folder is created. None writes nothing.
        page: file for a page of charts and tables, in the same way.
        threads: threads for torch and steadygrad alike; None takes two, or one on a single core.
        device: "cpu" or "cuda".
        limit: seconds after which no further case is begun; None has no limit.
        targets: whether to show the maintainers' floors and whether they were met.

    Returns:
        0, or 1 if a case failed. A floor that is missed is no error: it may be the machine.

    Raises:
        DeviceUnusable: the device cannot be used; says why.
        ValueError: `threads` is less than 1, or `device` is another.
    """
    count = min(2, os.cpu_count() or 1) if threads is None else threads
    if count < 1:
        raise ValueError(f"benchmarks: threads must be at least 1, got {threads}")
    with _threads(count):
        found = measure_all(console, device_named(device), quick=quick, limit=limit)
    show(console, found, out, page, targets)
    return int(any(reason.startswith(FAILED) for _, reason in found.skipped))


def show(
    console: Console,
    found: Run,
    out: Path | None,
    page: Path | None = None,
    targets: bool = False,
) -> None:
    """Print the tables of a run, and write its numbers to `out` and a page of them to `page`.

    `targets`: whether to show the maintainers' floors too; the numbers in `out` have them always.
    """
    for part in render(found, targets):
        _print_whole(console, part)
    result = to_json(found)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.print(f"Numbers written to {out}")
    if page is not None:
        write_page(result if targets else {**result, "targets": []}, page)
        console.print(f"Page written to {page}")


def _print_whole(console: Any, part: Table | Line) -> None:
    """Prints a table that is wider than the console as plain lines, of which nothing is cut off."""
    if isinstance(part, Table) and part.width > getattr(console, "width", math.inf):
        console.print(str(part), soft_wrap=True, markup=False, highlight=False)
    else:
        console.print(part)
