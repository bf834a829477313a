"""Runs side by side in processes of their own.

A worker is handed one run at a time. When the process that hands them out goes away, killed even,
the worker's pipe breaks and it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from .experiment import Experiment, RunKey
from .selection import Selection
from .tasks import Task
from .training import Run, train

# A worker tells how far it is every so many steps; so it also learns that nobody listens.
_STEPS_PER_MESSAGE = 10

Item = tuple[str, RunKey]


class WorkerError(RuntimeError):
    """A run could not be made; the message says which and why."""


class _NobodyListensError(Exception):
    """The process that hands out runs is gone."""


class OnProgress(Protocol):
    """Told how far a run is."""

    def __call__(self, place: int, item: Item, step: int, loss: float) -> None:
        """``place`` is the worker's, counted from 0."""


class Trainer:
    """Makes runs one after the other; the tasks of the problems are loaded once."""

    def __init__(self, experiments: Sequence[Experiment], threads: int) -> None:
        self._experiments = {experiment.name: experiment for experiment in experiments}
        self._tasks: dict[tuple[str, str], Task] = {}
        torch.set_num_threads(threads)

    def make(self, item: Item, on_step: Callable[[int, float], None] | None = None) -> Run:
        """Make one run."""
        name, key = item
        experiment = self._experiments[name]
        place = (name, key.problem)
        if place not in self._tasks:
            self._tasks[place] = experiment.problem(key.problem).task()
        return train(experiment, key, self._tasks[place], on_step)


def in_this_process(
    experiments: Sequence[Experiment],
    threads: int,
    items: Sequence[Item],
    is_over: Callable[[], bool],
    on_progress: OnProgress,
) -> Iterator[tuple[Item, Run]]:
    """Make runs one after the other, until there are none or ``is_over``."""
    before = torch.get_num_threads()
    trainer = Trainer(experiments, threads)
    try:
        for item in items:
            if is_over():
                return

            def show(step: int, loss: float, item: Item = item) -> None:
                if step % _STEPS_PER_MESSAGE == 1:
                    on_progress(0, item, step, loss)

            yield item, trainer.make(item, show)
    finally:
        torch.set_num_threads(before)


def in_processes(
    selection: Selection,
    jobs: int,
    threads: int,
    items: Sequence[Item],
    is_over: Callable[[], bool],
    on_progress: OnProgress,
) -> Iterator[tuple[Item, Run]]:
    """Make runs in ``jobs`` processes; they come as they are finished.

    Once ``is_over`` says so, what has begun is finished and nothing begun.

    Raises:
        WorkerError: a process died, or a run raised.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(items))
    busy: dict[Connection, tuple[int, Item]] = {}
    processes = []
    try:
        for place in range(min(jobs, len(items))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, selection, threads), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            item = waiting.pop()
            busy[ours] = place, item
            _send(ours, item)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                place, item = busy[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    processes[place].join()
                    raise WorkerError(
                        f"{_named(item)}: its process ended with exit code "
                        f"{processes[place].exitcode}; finished runs are kept"
                    ) from None
                if message[0] == "step":
                    on_progress(place, item, *message[1:])
                elif message[0] == "failed":
                    raise WorkerError(f"{_named(item)}: {message[1]}")
                else:
                    del busy[pipe]
                    if waiting and not is_over():
                        following = waiting.pop()
                        busy[pipe] = place, following
                        _send(pipe, following)
                    else:
                        pipe.close()
                    yield item, message[1]
    finally:
        for pipe in busy:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join()


def _send(pipe: Connection, item: Item) -> None:
    with contextlib.suppress(OSError):  # its process has died, which receiving tells
        pipe.send(item)


def _work(pipe: Any, selection: Selection, threads: int) -> None:
    """Make the runs that come through the pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to answer
    trainer: Trainer | None = None

    def send(*message: Any) -> None:
        try:
            pipe.send(message)
        except OSError as error:
            raise _NobodyListensError from error

    def show(step: int, loss: float) -> None:
        if step % _STEPS_PER_MESSAGE == 1:
            send("step", step, loss)

    try:
        while True:
            item = pipe.recv()
            try:
                if trainer is None:
                    trainer = Trainer(selection.experiments(), threads)
                run = trainer.make(item, show)
            except _NobodyListensError:
                raise
            except Exception:
                send("failed", traceback.format_exc(limit=-3))
            else:
                send("run", run)
    except (EOFError, OSError, _NobodyListensError):
        return


def _named(item: Item) -> str:
    name, key = item
    return f"{name}, {key.problem}, {key.arm}, learning rate {key.learning_rate:g}, seed {key.seed}"
