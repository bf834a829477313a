"""Make runs in parallel processes, which end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import connection
from typing import Any

import torch

from .data import StudyError
from .experiment import Experiment, RunKey
from .experiments import Selection
from .record import encode
from .tasks import Task
from .training import train

Item = tuple[str, RunKey]
Run = dict[str, Any]  # a run as JSON values
Tasks = Mapping[str, Task]  # tasks by the names of their problems


@lru_cache  # a process works for one study only
def _load(selection: Selection, name: str) -> tuple[Experiment, Tasks]:
    experiment = next(e for e in selection.experiments() if e.name == name)
    return experiment, {problem.name: problem.task() for problem in experiment.problems}


def _make(selection: Selection, item: Item, loaded: tuple[Experiment, Tasks] | None = None) -> Run:
    """Make a run; without ``loaded``, load experiment and tasks once per process."""
    name, key = item
    try:
        experiment, tasks = loaded or _load(selection, name)
        run: Run = encode(train(experiment, key, tasks[key.problem]))
    except Exception as error:
        raise StudyError(f"{_named(item)}: {traceback.format_exc(limit=-3)}") from error
    return run


def make_all(
    selection: Selection,
    loaded: Mapping[str, tuple[Experiment, Tasks]],
    jobs: int,
    threads: int,
    items: Sequence[Item],
    is_over: Callable[[], bool],
) -> Iterator[tuple[Item, Run]]:
    """Make runs in ``jobs`` processes, or in this process if ``jobs`` is 1; yield them as they finish.

    Other processes load the selection themselves; this process uses ``loaded``, which maps names of
    experiments to what a selection loads. Once ``is_over`` returns True, runs that have begun are
    finished and no others begin.

    Raises:
        StudyError: A process died, or a run raised.
    """
    waiting, under_way = list(reversed(items)), dict[Future[Run], Item]()
    if jobs == 1:
        torch.set_num_threads(threads)
        while waiting and not is_over():
            item = waiting.pop()
            yield item, _make(selection, item, loaded[item[0]])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin, (threads,))
    try:
        while True:
            # A run that waits in the pool would begin even after is_over, so there are never more
            # runs in the pool than processes.
            while waiting and len(under_way) < jobs and not is_over():
                item = waiting.pop()
                under_way[pool.submit(_make, selection, item)] = item
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
        raise StudyError(
            f"{'; or '.join(map(_named, [item, *under_way.values()]))}: its process ended with exit "
            f"code {next(iter(codes), 'unknown')}; finished runs are kept"
        ) from error
    finally:  # after Ctrl-C, runs under way are not waited for
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    """Prepare a process: it ignores Ctrl-C, which its parent handles, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_parent() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _named(item: Item) -> str:
    name, key = item
    return f"{name}, {key.problem}, {key.arm}, learning rate {key.learning_rate:g}, seed {key.seed}"
