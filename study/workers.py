"""Runs side by side in processes of their own, which end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import connection
from typing import Any

import torch

from .experiment import RunKey
from .record import encode
from .selection import Selection
from .tasks import Task
from .training import train

Item = tuple[str, RunKey]
Made = tuple[Item, dict[str, Any]]


class WorkerError(RuntimeError):
    """A run could not be made; the message says which and why."""


@lru_cache(maxsize=1)
def _experiments(selection: Selection) -> dict[str, Any]:
    return {experiment.name: experiment for experiment in selection.experiments()}


@lru_cache
def _task(selection: Selection, experiment: str, problem: str) -> Task:
    """Load the task of a problem, once in every process."""
    task: Task = _experiments(selection)[experiment].problem(problem).task()
    return task


def make(selection: Selection, item: Item) -> dict[str, Any]:
    """Make one run, as JSON values.

    Raises:
        WorkerError: it raised something; the message has its last lines.
    """
    name, key = item
    try:
        task = _task(selection, name, key.problem)
        run: dict[str, Any] = encode(train(_experiments(selection)[name], key, task))
    except Exception as error:
        raise WorkerError(f"{_named(item)}: {traceback.format_exc(limit=-3)}") from error
    return run


def make_all(
    selection: Selection,
    jobs: int,
    threads: int,
    items: Sequence[Item],
    is_over: Callable[[], bool],
) -> Iterator[Made]:
    """Make runs in ``jobs`` processes, one alone in this process; they come as they are finished.

    Once ``is_over`` says so, what has begun is finished and nothing begun.

    Raises:
        WorkerError: a process died, or a run raised.
    """
    if jobs == 1:
        yield from _here(selection, threads, items, is_over)
        return
    context = multiprocessing.get_context("spawn")
    waiting, under_way = list(reversed(items)), dict[Future[dict[str, Any]], Item]()
    pool = ProcessPoolExecutor(jobs, context, _begin, (threads,))
    try:
        while True:
            # No more than there are processes: what waits in the pool would be begun after the end.
            while waiting and len(under_way) < jobs and not is_over():
                item = waiting.pop()
                under_way[pool.submit(make, selection, item)] = item
            if not under_way:
                return
            children = multiprocessing.active_children()
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                item = under_way.pop(future)
                yield item, future.result()
    except BrokenProcessPool as error:
        for child in children:
            child.join(5)
        codes = [c.exitcode for c in children if c.exitcode not in (None, 0, -signal.SIGTERM)]
        raise WorkerError(
            f"{'; or '.join(map(_named, [item, *under_way.values()]))}: its process ended with exit "
            f"code {next(iter(codes), 'unknown')}; finished runs are kept"
        ) from error
    finally:  # Ctrl-C does not wait for what is under way
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _here(
    selection: Selection, threads: int, items: Sequence[Item], is_over: Callable[[], bool]
) -> Iterator[Made]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for item in items:
            if is_over():
                return
            yield item, make(selection, item)
    finally:
        torch.set_num_threads(before)


def _begin(threads: int) -> None:
    """Prepare a process: Ctrl-C is its parent's to answer, and it ends when its parent is gone, killed even."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _named(item: Item) -> str:
    name, key = item
    return f"{name}, {key.problem}, {key.arm}, learning rate {key.learning_rate:g}, seed {key.seed}"
