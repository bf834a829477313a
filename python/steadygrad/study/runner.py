"""Carries an experiment out and leaves its report, plot and record behind."""

from __future__ import annotations

import contextlib
import datetime
import pathlib
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from . import record
from .data import Dataset, MissingDependencyError, require
from .experiments import QUICK, Experiment
from .plot import plot
from .report import print_report
from .training import Run, train

# One thread: matrices of 100 x 100 gain 5 % from a second one, and lose a factor when it is busy.
_DEFAULT_THREADS = 1
_STEPS_PER_REFRESH = 10


def run_quick(out: pathlib.Path, console: Console, threads: int | None) -> int:
    """Carry out the quick study and write ``study.json`` and ``study.png``.

    Takes about two minutes. After Ctrl-C, what was finished until then is still written.

    Args:
        out: folder of the files, made if need be.
        console: where progress, table and conclusions go.
        threads: threads torch may use, 1 by default; the numbers depend on it in the last digits.

    Returns:
        Exit status: 0, or 1 if a package is missing, or 130 after Ctrl-C.

    Raises:
        ValueError: ``threads`` is less than 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"run_quick: threads must be at least 1, got {threads}")
    return carry_out(QUICK, out, console, threads or _DEFAULT_THREADS)


def carry_out(experiment: Experiment, out: pathlib.Path, console: Console, threads: int) -> int:
    """Carry out ``experiment``; the arguments and the result are those of :func:`run_quick`."""
    try:
        require("matplotlib")  # before minutes of training, not after
        data = experiment.data()
    except MissingDependencyError as error:
        console.print(str(error), style="bold red", markup=False, highlight=False)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    with _threads(threads):
        study = run_study(experiment, data, console)
    files = [out / "study.json"]
    record.write(study, files[0])
    if study.runs:
        console.print()
        print_report(experiment, study.rows(), console)
        files.append(out / "study.png")
        plot(study, files[1])
    console.print()
    planned = len(experiment.plan())
    if study.status != "complete":
        why = {"interrupted": "Interrupted", "time limit": "Stopped at the time limit"}
        console.print(
            f"{why[study.status]} after {len(study.runs)} of {planned} runs: "
            "the results are partial.",
            style="bold yellow",
        )
    names = " and ".join(str(file) for file in files)
    summary = f"{len(study.runs)} runs in {study.wall_s:.0f} s, written to {names}"
    console.print(summary, markup=False, soft_wrap=True)
    return 130 if study.status == "interrupted" else 0


def run_study(experiment: Experiment, data: Dataset, console: Console) -> record.Study:
    """Make the runs of ``experiment`` one after the other, with progress bars on ``console``.

    Ctrl-C ends the study and drops the run in progress. Nothing is written.
    """
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    began = time.perf_counter()
    runs: list[Run] = []
    try:
        _make_runs(experiment, data, console, runs)
    except KeyboardInterrupt:
        status = "interrupted"
    else:
        status = "complete" if len(runs) == len(experiment.plan()) else "time limit"
    return record.Study(
        status=status,
        started=started,
        wall_s=time.perf_counter() - began,
        command_line=record.command_line(),
        machine=record.machine(),
        versions=record.versions(),
        experiment=record.describe(experiment, data.name),
        runs=tuple(runs),
    )


def _make_runs(experiment: Experiment, data: Dataset, console: Console, runs: list[Run]) -> None:
    """Append to ``runs`` until the plan or the time is used up."""
    deadline = time.perf_counter() + experiment.time_limit_s
    plan = experiment.plan()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("all runs", total=len(plan), note="")
        bar = progress.add_task("", total=experiment.steps, note="")

        def show(step: int, loss: float) -> None:
            if step % _STEPS_PER_REFRESH == 0:
                progress.update(bar, completed=step, note=f"loss {loss:.3g}")

        for seed, learning_rate, arm in plan:
            if time.perf_counter() > deadline:
                break
            label = f"{arm.name}, lr {learning_rate:g}, seed {seed}"
            progress.reset(bar, description=label, note="")
            runs.append(train(experiment, arm, learning_rate, seed, data, show))
            progress.advance(total)
        progress.update(bar, visible=False)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
