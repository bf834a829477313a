"""Runs a script as the ranks of a gloo group, each in a process of its own, and collects what they found."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

Found = list[dict[str, Any]]  # what each rank found


def join_ranks(rank: int, world: int, folder: Path) -> None:
    """Join the process group; a script that runs as a rank begins with this call."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )


def leave_ranks(found: dict[str, Any], rank: int, folder: Path) -> NoReturn:
    """Save what a rank found for :func:`outcome`, and end the process; such a script ends with this call."""
    torch.save(found, folder / f"found{rank}")
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # After gloo groups torch's own destructors sometimes abort, "terminate called without an active exception".
    os._exit(0)


# Importing torch takes a rank longer than most of what it then does: ranks are forked from a process that has done it.
_FORK_SERVER = multiprocessing.get_context("forkserver")
_FORK_SERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp"])
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def _run_rank(script: str, rank: int, world: int, folder: str, arguments: tuple[str, ...]) -> None:
    """Run the script as ``python -W error script rank world folder arguments`` would, in this process."""
    with Path(folder, f"log{rank}").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("error")
    sys.argv = [script, str(rank), str(world), folder, *arguments]
    runpy.run_path(script, run_name="__main__")


@cache
def outcome(script: Path, world: int, time_limit: float, *arguments: str) -> Found | str:
    """Return what the ranks found, or how they failed; cached, so that no other test waits for them again.

    The arguments of the script are its rank, the number of ranks, a folder in which it saves ``found<rank>``, and then
    ``arguments``.
    """
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for variable, value in _ENVIRONMENT.items():
            patch.setenv(variable, value)
        folder = Path(name)
        ranks = [
            _FORK_SERVER.Process(
                target=_run_rank, args=(str(script), rank, world, name, arguments), daemon=True
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            deadline = time.monotonic() + time_limit
            while any(rank.exitcode is None for rank in ranks) and time.monotonic() < deadline:
                if any(rank.exitcode for rank in ranks):
                    time.sleep(1)  # the other ranks may still write what they lost
                    break
                time.sleep(0.05)
            codes = [rank.exitcode for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        if codes != [0] * world:
            ends = [(folder / f"log{rank}").read_text()[-3000:] for rank in range(world)]
            parts = (
                f"rank {r}, exit {c}:\n{e}"
                for r, (c, e) in enumerate(zip(codes, ends, strict=True))
            )
            return "\n".join(parts)
        return [torch.load(folder / f"found{rank}") for rank in range(world)]


def found(script: Path, world: int, time_limit: float, name: str, *arguments: str) -> Found:
    """Return what each rank found under this name; fail if the ranks failed."""
    results = outcome(script, world, time_limit, *arguments)
    if isinstance(results, str):
        pytest.fail(results, pytrace=False)
    return [result[name] for result in results]
