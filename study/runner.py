"""Carry out experiments in parallel processes, and write their record and report."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text

from . import journal, record
from .data import StudyError
from .experiment import Experiment, Problem, RunKey
from .experiments import Selection
from .journal import Journal
from .tasks import Task
from .training import rehearse
from .workers import Tasks, make_all

_QUICK_LIMIT_S = 200.0
# Maps columns of the printed table to their headings.
_PRINTED = {
    "learning rate": "lr",
    "survived": "sur-\nvived",
    "learned": "\nlearned",
    "clipped": "steps\nclipped",
    "largest norm": "largest\nnorm",
}


@dataclass(frozen=True)
class Settings:
    """Says how a study is carried out.

    Settings change no results except times; ``threads`` may also change last digits.

    Raises:
        ValueError: A count is less than 1.
    """

    out: Path  # folder of the files, created if it does not exist
    jobs: int | None = None  # number of parallel processes; None: one per core
    # CPU threads of torch in each process. A second thread makes matrices of 100 x 100 5 % faster,
    # and several times slower when its core is busy.
    threads: int = 1
    limit_s: float | None = None  # no run begins later; None: no limit, 200 s if quick
    restart: bool = False  # drops an unfinished study instead of resuming it

    def __post_init__(self) -> None:
        for name in ("jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"study: {name}: expected at least 1, got {value}")


def run_study(selection: Selection, settings: Settings, console: Console) -> int:
    """Carry out the selected experiments; print progress and tables to the console.

    Writes ``study.json`` and the pages rendered from it. Finished runs are kept in ``journal.jsonl``
    until all are done, so that the same call resumes after a kill, Ctrl-C or the time limit.

    Returns:
        Exit status: 0 on success, 1 if there is nothing to run or a run could not be made, 130
        after Ctrl-C.
    """
    try:
        loaded = {e.name: (e, _load(e)) for e in selection.experiments()}
        settings.out.mkdir(parents=True, exist_ok=True)
        if not settings.restart:
            _spare_results(list(loaded), settings.out / record.NAME)
        study = _Study(selection, settings, loaded)
        path = settings.out / journal.NAME
        plan = study.what_decides_the_numbers()
        with contextlib.closing(Journal(path, plan, record.now(), settings.restart)) as made:
            return study.carry_out(made, console)
    except ValueError as error:
        return _complain(console, str(error))
    except OSError as error:
        name = error.filename or f"{settings.out} or standard output"
        return _complain(console, f"study: {name}: {error.strerror or error}")


def _load(experiment: Experiment) -> dict[str, Task]:
    """Load the task of every problem and rehearse every arm, so that errors show before training."""
    tasks = {problem.name: problem.task() for problem in experiment.problems}
    for name, task in tasks.items():
        for arm in experiment.arms:
            key = RunKey(name, arm.name, experiment.learning_rates[0], experiment.seeds[0])
            try:
                rehearse(experiment, key, task, measure=arm is experiment.arms[0])
            except Exception as error:
                place = f"study: {experiment.name}, {name}, arm {arm.name!r}"
                raise StudyError(f"{place}: {type(error).__name__}: {error}") from error
    return tasks


def _spare_results(names: list[str], path: Path) -> None:
    """Refuse to overwrite the results of another study.

    Raises:
        StudyError: The file at ``path`` holds other experiments, or is no record.
    """
    try:
        there = [experiment["name"] for experiment in record.read([path])[0]["experiments"]]
    except (ValueError, KeyError, TypeError):
        there = []
    if path.exists() and there != names:
        raise StudyError(
            f"study: {path} has the results of {', '.join(there) or 'something else'}; name another "
            "--out, or add --restart to replace them"
        )


class _Study:
    """Carries out a study; ``loaded`` maps names of experiments to them and their problems' tasks."""

    def __init__(
        self,
        selection: Selection,
        settings: Settings,
        loaded: Mapping[str, tuple[Experiment, Tasks]],
    ) -> None:
        self.selection, self.settings, self.loaded = selection, settings, loaded
        self.threads = settings.threads
        self.jobs = settings.jobs or len(os.sched_getaffinity(0))
        self.files = [Path(name) for name in selection.names if name.endswith(".py")]
        # All experiments run one seed before the next, so a study cut short has compared all arms.
        self.plan = [(name, key) for name, (e, _) in loaded.items() for key in e.plan()]
        self.plan.sort(key=lambda item: loaded[item[0]][0].seeds.index(item[1].seed))

    def what_decides_the_numbers(self) -> dict[str, Any]:
        return {
            "experiments": [experiment.describe() for experiment, _ in self.loaded.values()],
            "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files],
            "data": [
                _first_batch(tasks[problem.name], problem)
                for experiment, tasks in self.loaded.values()
                for problem in experiment.problems
            ],
            "versions": record.versions(),
            "threads": self.threads,
        }

    def carry_out(self, made: Journal, console: Console) -> int:
        if made.runs:
            console.print(f"Going on after {len(made.runs)} finished runs.", style="bold")
        status = "complete"
        try:
            self._make_runs(made, console)
            if len(made.runs) < len(self.plan):
                status = "time limit"
        except KeyboardInterrupt:
            status = "interrupted"
            # Writing takes a second or two, and a second Ctrl-C must not interrupt it.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        document = self._document(made, status)
        files = [self.settings.out / record.NAME]
        record.write(document, files[0])
        from . import page  # training processes do without its libraries

        files += page.write_pages([document], self.settings.out)
        if status == "interrupted":
            signal.signal(signal.SIGINT, before)
        if status == "complete":
            made.path.unlink(missing_ok=True)  # the record holds all of it
        console.print()
        print_tables(document, console)
        if status != "complete":
            why = {"interrupted": "Interrupted", "time limit": "Stopped at the time limit"}
            console.print(
                f"\n{why[status]} after {len(made.runs)} of {len(self.plan)} runs: the results are "
                "partial. The same command goes on from here.",
                style="bold yellow",
            )
        made_in = f"{len(made.runs):,} run(s) in {sum(made.sessions):.0f} s"
        where = " and ".join(map(str, files))
        console.print(f"\n{made_in}, written to {where}", markup=False, soft_wrap=True)
        return 130 if status == "interrupted" else 0

    def _make_runs(self, made: Journal, console: Console) -> None:
        """Make the runs that are not in the journal, and show a progress bar."""
        quick = self.selection.mode == "quick"
        limit = self.settings.limit_s or (_QUICK_LIMIT_S if quick else math.inf)
        deadline = time.perf_counter() + limit
        left = [item for item in self.plan if item not in made.runs]
        jobs = min(self.jobs, max(1, len(left)))
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(self.plan), completed=len(made.runs))
            for (name, key), run in make_all(
                *(self.selection, self.loaded, jobs, self.threads, left),
                is_over=lambda: time.perf_counter() > deadline,
            ):
                made.add(name, run)
                done = f"{key.problem}: {key.arm}, {key.learning_rate:g}, seed {key.seed}"
                progress.update(bar, advance=1, description=escape(done))

    def _document(self, made: Journal, status: str) -> dict[str, Any]:
        curves = 3 if len(self.loaded) == 1 else 1
        return {
            "schema": record.SCHEMA,
            "status": status,
            "mode": "file" if self.files else self.selection.mode,
            "started": made.started,
            "wall_s": sum(made.sessions),
            "sessions": len(made.sessions),
            "command_line": record.without_folders(sys.orig_argv),
            "machine": {**record.machine(), "jobs": self.jobs, "threads": self.threads},
            "versions": record.versions(),
            "definitions": record.DEFINITIONS,
            "experiments": [
                record.describe(
                    e, tasks, [r for (n, _), r in made.runs.items() if n == name], curves
                )
                for name, (e, tasks) in self.loaded.items()
            ],
        }


def _first_batch(task: Task, problem: Problem) -> str:
    """Return a hash of the first batch, which differs for other data of the same name and shape."""
    batch = next(task.batches(problem.batch_size, torch.Generator().manual_seed(0)))
    return hashlib.sha256(repr([tensor.tolist() for tensor in batch]).encode()).hexdigest()


def print_tables(document: Mapping[str, Any], console: Console) -> None:
    """Print a table for each problem, arm by arm, and the meaning of its words."""
    from . import table as tables

    for experiment in document["experiments"]:
        if not experiment["runs"]:
            continue
        rows = tables.summarise(experiment, tables.runs_of(experiment))
        for problem in experiment["problems"]:
            grid = Table(title=Text(problem["title"]), title_justify="left", box=box.SIMPLE_HEAD)
            grid.pad_edge, grid.collapse_padding = False, True  # fits the table into 80 columns
            grid.add_column("arm", max_width=18)
            metric = "\n".join(problem["metric"]["name"].rsplit(" ", 1))
            for heading in (*_PRINTED.values(), f"{metric}\n(95 %)", "ms a\nstep"):
                grid.add_column(heading, justify="right", no_wrap=True)
            for arm, own in rows[rows["problem"] == problem["name"]].groupby("arm", observed=True):
                names = [str(arm)] + [""] * (len(own) - 1)
                for text, row in zip(names, own.itertuples(), strict=True):
                    cells = [tables.COLUMNS[name](row) for name in _PRINTED]
                    cells += [row.metric.text(short=True), row.seconds.text(1e3).partition(" ")[0]]
                    grid.add_row(Text(text, style="bold"), *cells)
                grid.add_section()
            console.print(grid)
    for term in ("survived", "learned", "exploded"):
        console.print(f"{term}: {document['definitions'][term]}.", style="dim", highlight=False)


def report_again(files: Sequence[Path], out: Path, console: Console) -> int:
    """Render the pages from existing records; return the exit status."""
    from . import page

    names = ", ".join(map(str, files))
    if len({file.resolve() for file in files}) < len(files):
        return _complain(console, f"study: --report: expected each file once, got {names}")
    try:
        written = page.write_pages(record.read(files), out)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        return _complain(
            console, f"{names}: expected whole records of studies, got one with {found}"
        )
    except ValueError as error:
        return _complain(console, str(error))
    console.print(f"Written: {' and '.join(map(str, written))}", markup=False, soft_wrap=True)
    return 0


def _complain(console: Console, message: str) -> int:
    console.print(message, style="bold red", markup=False, highlight=False)
    return 1
