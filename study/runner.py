"""Carries experiments out, in processes side by side, and leaves report and record behind."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from . import page, record
from .arms import Arm
from .data import MissingDependencyError
from .experiment import Experiment, Problem, RunKey
from .journal import NAME, Journal, JournalError
from .page import read_documents
from .report import print_report
from .selection import Selection, SelectionError
from .tasks import Task
from .training import rehearse
from .workers import Item, WorkerError, in_processes, in_this_process

# One thread each: matrices of 100 x 100 gain 5 % from a second one, and lose a factor when it is busy.
_DEFAULT_THREADS = 1
RECORD = "study.json"
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
        _spare_results(experiments, settings)
        journal = _journal(selection, experiments, tasks, settings)
        try:
            return _carry_out(selection, experiments, tasks, settings, journal, console)
        finally:
            journal.close()
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
        for problem in experiment.problems:
            for arm in experiment.arms:
                _rehearse(experiment, problem, arm, own[problem.name])
    return tasks


def _rehearse(experiment: Experiment, problem: Problem, arm: Arm, task: Task) -> None:
    key = RunKey(problem.name, arm.name, experiment.learning_rates[0], experiment.seeds[0])
    try:
        rehearse(experiment, key, task, measure=arm is experiment.arms[0])
    except Exception as error:
        raise SelectionError(
            f"study: {experiment.name}, {problem.name}, arm {arm.name!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _spare_results(experiments: Sequence[Experiment], settings: Settings) -> None:
    """Refuse to write over the results of another study."""
    path = settings.out / RECORD
    if settings.restart or not path.exists():
        return
    try:
        there = [experiment["name"] for experiment in read_documents([path])[0]["experiments"]]
    except (ValueError, KeyError, TypeError):
        there = []
    if there != [experiment.name for experiment in experiments]:
        raise SelectionError(
            f"study: {path} has the results of {', '.join(there) or 'something else'}; name another "
            "--out, or add --restart to replace them"
        )


def _journal(
    selection: Selection,
    experiments: Sequence[Experiment],
    tasks: dict[str, dict[str, Task]],
    settings: Settings,
) -> Journal:
    """Open the journal in the folder of the results."""
    files = [pathlib.Path(name) for name in selection.names if name.endswith(".py")]
    plan = {
        "experiments": [experiment.describe() for experiment in experiments],
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "data": [
            _first_batch(tasks[experiment.name][problem.name], problem)
            for experiment in experiments
            for problem in experiment.problems
        ],
        "versions": record.versions(),
        "threads": settings.threads or _DEFAULT_THREADS,
    }
    journal = Journal(settings.out / NAME, plan)
    now = datetime.datetime.now(datetime.timezone.utc)
    journal.open(now.isoformat(timespec="seconds"), settings.restart)
    return journal


def _first_batch(task: Task, problem: Problem) -> str:
    """What tells a problem's data from other data of the same name and shape."""
    batch = next(task.batches(problem.batch_size, torch.Generator().manual_seed(0)))
    digest = hashlib.sha256()
    for tensor in batch:
        digest.update(repr(tensor.tolist()).encode())
    return digest.hexdigest()


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
    with _impatience_ignored() if status == "interrupted" else contextlib.nullcontext():
        document = _document(selection, experiments, tasks, settings, journal, status)
        files = _write(document, settings.out)
    if status == "complete":
        journal.remove()
    if journal.runs:
        console.print()
        print_report(document, console)
    console.print()
    if status != "complete":
        why = {"interrupted": "Interrupted", "time limit": "Stopped at the time limit"}
        console.print(
            f"{why[status]} after {len(journal.runs)} of {len(plan)} runs: the results are partial. "
            "The same command goes on from here.",
            style="bold yellow",
        )
    names = " and ".join(str(file) for file in files)
    count = len(journal.runs)
    made = f"{count:,} run{'' if count == 1 else 's'} in {sum(journal.sessions):.0f} s"
    summary = f"{made}, written to {names}"
    console.print(summary, markup=False, soft_wrap=True)
    return 130 if status == "interrupted" else 0


@contextlib.contextmanager
def _impatience_ignored() -> Iterator[None]:
    """Writing takes a second or two, and a second Ctrl-C is to stop what has stopped."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
                description=escape(
                    f"{key.problem}: {key.arm}, {key.learning_rate:g}, seed {key.seed}"
                ),
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
    files = [out / RECORD]
    record.write(document, files[0])
    return [*files, *_write_pages([document], out)]


def report_again(files: Sequence[pathlib.Path], out: pathlib.Path, console: Console) -> int:
    """Make the pages from results that are there; return the exit status."""
    names = ", ".join(map(str, files))
    if len({file.resolve() for file in files}) < len(files):
        _complain(console, f"study: --report: expected each file once, got {names}")
        return 1
    try:
        written = _write_pages(read_documents(files), out)
    except (OSError, ValueError) as error:
        _complain(console, str(error))
        return 1
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        _complain(console, f"{names}: expected whole records of studies, got one with {found}")
        return 1
    console.print(f"Written: {' and '.join(map(str, written))}", markup=False, soft_wrap=True)
    return 0


def _write_pages(documents: Sequence[Mapping[str, Any]], out: pathlib.Path) -> list[pathlib.Path]:
    files = [out / "study.html", out / "study.md"]
    page.write_page(documents, files[0])
    page.write_markdown(documents, files[1])
    return files


def _complain(console: Console, message: str) -> None:
    console.print(message, style="bold red", markup=False, highlight=False)


__all__ = ["JournalError", "Settings", "run_study"]
