"""Carries experiments out, in processes side by side, and leaves report and record behind."""

from __future__ import annotations

import datetime
import importlib
import os
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from . import record
from .data import MissingDependencyError
from .experiment import Experiment
from .journal import NAME, Journal, JournalError
from .report import print_report
from .selection import Selection, SelectionError
from .tasks import Task
from .workers import Item, WorkerError, in_processes, in_this_process

# One thread each: matrices of 100 x 100 gain 5 % from a second one, and lose a factor when it is busy.
_DEFAULT_THREADS = 1
_QUICK_LIMIT_S = 200.0


@dataclass(frozen=True)
class Settings:
    """How a study is carried out; none of it changes a number but times, and ``threads`` last digits.

    Attributes:
        out: folder of the files, made if need be.
        jobs: processes side by side; None: one for each core that this process may use.
        threads: of torch in each process; None: 1.
        limit_s: no run is begun once this many seconds have gone by; None: no limit, 200 s for the
            quick study.
        restart: drops what an unfinished study has left in ``out``, which is otherwise gone on with.
    """

    out: pathlib.Path
    jobs: int | None = None
    threads: int | None = None
    limit_s: float | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: one is less than 1, or not above 0.
        """
        for name in ("jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"study: {name}: expected at least 1, got {value}")


def run_study(selection: Selection, settings: Settings, console: Console) -> int:
    """Carry the selected experiments out.

    Writes ``study.json`` and the pages made of it. What is finished is also in ``journal.jsonl``
    until all is done: the same call goes on after a kill, Ctrl-C or the time limit.

    Args:
        selection: which experiments.
        settings: where to, and how.
        console: where progress, tables and conclusions go.

    Returns:
        Exit status: 0; 1 if there is nothing to run or a run could not be made; 130 after Ctrl-C.
    """
    try:
        experiments = selection.experiments()
        tasks = _load(experiments)
        settings.out.mkdir(parents=True, exist_ok=True)
        journal = _journal(selection, experiments, settings)
        return _carry_out(selection, experiments, tasks, settings, journal, console)
    except (MissingDependencyError, ValueError, WorkerError) as error:
        _complain(console, str(error))
    except OSError as error:
        _complain(console, f"study: {error.filename or settings.out}: {error.strerror or error}")
    return 1


def _load(experiments: Sequence[Experiment]) -> dict[str, dict[str, Task]]:
    """Load the task of every problem, which also says what is missing before anything is trained."""
    tasks: dict[str, dict[str, Task]] = {}
    for experiment in experiments:
        own = tasks[experiment.name] = {}
        for problem in experiment.problems:
            own[problem.name] = problem.task()
        for arm in experiment.arms:
            for task in own.values():
                _fits(experiment, arm, task)
    return tasks


def _fits(experiment: Experiment, arm: Any, task: Task) -> None:
    try:
        changed = task if arm.task is None else arm.task(task)
        if arm.early_stopping:
            changed.hold_out(0)
    except ValueError as error:
        raise SelectionError(f"study: {experiment.name}: arm {arm.name!r}: {error}") from error


def _journal(
    selection: Selection, experiments: Sequence[Experiment], settings: Settings
) -> Journal:
    """Open the journal in the folder of the results."""
    plan = {
        "experiments": [experiment.describe() for experiment in experiments],
        "data": selection.data,
        "versions": record.versions(),
        "threads": settings.threads or _DEFAULT_THREADS,
    }
    journal = Journal(settings.out / NAME, plan)
    if settings.restart:
        journal.remove()
    now = datetime.datetime.now(datetime.timezone.utc)
    journal.open(now.isoformat(timespec="seconds"))
    return journal


def _carry_out(
    selection: Selection,
    experiments: list[Experiment],
    tasks: dict[str, dict[str, Task]],
    settings: Settings,
    journal: Journal,
    console: Console,
) -> int:
    if journal.runs:
        console.print(f"Going on after {len(journal.runs)} finished runs.", style="bold")
    plan = _plan(experiments)
    status = "complete"
    try:
        _make_runs(selection, experiments, settings, journal, plan, console)
        if len(journal.runs) < len(plan):
            status = "time limit"
    except KeyboardInterrupt:
        status = "interrupted"
    document = _document(selection, experiments, tasks, settings, journal, status)
    files = _write(document, settings.out)
    if journal.runs:
        console.print()
        print_report(document, console)
    console.print()
    if status == "complete":
        journal.remove()
    else:
        why = {"interrupted": "Interrupted", "time limit": "Stopped at the time limit"}
        console.print(
            f"{why[status]} after {len(journal.runs)} of {len(plan)} runs: the results are partial. "
            "The same command goes on from here.",
            style="bold yellow",
        )
    names = " and ".join(str(file) for file in files)
    summary = f"{len(journal.runs)} runs in {sum(journal.sessions):.0f} s, written to {names}"
    console.print(summary, markup=False, soft_wrap=True)
    return 130 if status == "interrupted" else 0


def _plan(experiments: Sequence[Experiment]) -> list[Item]:
    """List all runs, one seed of every experiment after the other."""
    items = [(experiment.name, key) for experiment in experiments for key in experiment.plan()]
    places = {
        experiment.name: {seed: place for place, seed in enumerate(experiment.seeds)}
        for experiment in experiments
    }
    return sorted(items, key=lambda item: places[item[0]][item[1].seed])


def _make_runs(
    selection: Selection,
    experiments: list[Experiment],
    settings: Settings,
    journal: Journal,
    plan: list[Item],
    console: Console,
) -> None:
    """Make the runs that the journal does not have, with progress bars."""
    limit = settings.limit_s
    if limit is None and selection.mode == "quick":
        limit = _QUICK_LIMIT_S
    deadline = None if limit is None else time.perf_counter() + limit
    left = [item for item in plan if item not in journal.runs]
    jobs = min(settings.jobs or len(os.sched_getaffinity(0)), max(1, len(left)))
    threads = settings.threads or _DEFAULT_THREADS
    if not left:
        return
    steps = {
        (experiment.name, problem.name): problem.steps
        for experiment in experiments
        for problem in experiment.problems
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("all runs", total=len(plan), completed=len(journal.runs), note="")
        bars: list[TaskID] = [progress.add_task("", total=None, note="") for _ in range(jobs)]

        def show(place: int, item: Item, step: int, loss: float) -> None:
            name, key = item
            progress.update(
                bars[place],
                description=f"{key.problem}: {key.arm}, {key.learning_rate:g}, seed {key.seed}",
                total=steps[name, key.problem],
                completed=step,
                note=f"loss {loss:.3g}",
            )

        def is_over() -> bool:
            return deadline is not None and time.perf_counter() > deadline

        made = (
            in_this_process(experiments, threads, left, is_over, show)
            if jobs == 1
            else in_processes(selection, jobs, threads, left, is_over, show)
        )
        for (name, _), run in made:
            journal.add(name, run)
            progress.advance(total)
        for bar in bars:
            progress.update(bar, visible=False)


def _document(
    selection: Selection,
    experiments: Sequence[Experiment],
    tasks: dict[str, dict[str, Task]],
    settings: Settings,
    journal: Journal,
    status: str,
) -> dict[str, Any]:
    own_file = any(name.endswith(".py") for name in selection.names)
    return record.document(
        record.Study(
            status=status,
            mode="file" if own_file else selection.mode,
            started=journal.started or "",
            wall_s=sum(journal.sessions),
            sessions=len(journal.sessions),
            jobs=settings.jobs or len(os.sched_getaffinity(0)),
            threads=settings.threads or _DEFAULT_THREADS,
            experiments=tuple(
                record.describe(
                    experiment,
                    tasks[experiment.name],
                    [run for (name, _), run in journal.runs.items() if name == experiment.name],
                    curves=3 if len(experiments) == 1 else 1,
                )
                for experiment in experiments
            ),
        )
    )


def _write(document: dict[str, Any], out: pathlib.Path) -> list[pathlib.Path]:
    """Write the record, and the pages made of it."""
    files = [out / "study.json"]
    record.write(document, files[0])
    try:
        page = importlib.import_module(f"{__package__}.page")
    except ModuleNotFoundError:
        return files
    return [*files, *_write_pages(page, [document], out)]


def report_again(files: Sequence[pathlib.Path], out: pathlib.Path, console: Console) -> int:
    """Make the pages from results that are there; return the exit status."""
    page = importlib.import_module(f"{__package__}.page")
    try:
        _write_pages(page, page.read_documents(files), out)
    except (OSError, ValueError) as error:
        _complain(console, str(error))
        return 1
    return 0


def _write_pages(page: Any, documents: Any, out: pathlib.Path) -> list[pathlib.Path]:
    files = [out / "study.html", out / "study.md"]
    page.write_page(documents, files[0])
    page.write_markdown(documents, files[1])
    return files


def _complain(console: Console, message: str) -> None:
    console.print(message, style="bold red", markup=False, highlight=False)


__all__ = ["JournalError", "Settings", "run_study"]
