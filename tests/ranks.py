"""Runs a script as the ranks of a gloo group, each a process of its own, and brings back what they found."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

Found = list[dict[str, Any]]  # of each rank


def join_ranks(rank: int, world: int, folder: Path) -> None:
    """What a script that runs as a rank begins with."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )


def leave_ranks(found: dict[str, Any], rank: int, folder: Path) -> NoReturn:
    """What such a script ends with: leaves what it found for :func:`outcome`, and ends the process."""
    torch.save(found, folder / f"found{rank}")
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # After gloo groups torch's own destructors abort now and then, "terminate called without an active exception".
    os._exit(0)


@cache
def outcome(script: Path, world: int, time_limit: float, *arguments: str) -> Found | str:
    """What the ranks found; or how they failed, so that no test waits for it again.

    The script gets its rank, the number of ranks and a folder, where it leaves ``found<rank>`` by ``torch.save``; then
    the arguments.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = [(folder / f"log{rank}").open("wb") for rank in range(world)]
        command = [sys.executable, "-W", "error", str(script)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(world), name, *arguments],
                stderr=log,
                stdout=log,
                env=environment,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            deadline = time.monotonic() + time_limit
            while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
                if any(rank.returncode for rank in ranks):
                    time.sleep(1)  # for the others to say what they lost
                    break
                time.sleep(0.05)
            codes = [rank.poll() for rank in ranks]
        finally:
            for rank, log in zip(ranks, logs, strict=True):
                rank.kill()
                rank.wait()
                log.close()
        if codes != [0] * world:
            ends = [(folder / f"log{rank}").read_text()[-3000:] for rank in range(world)]
            parts = (
                f"rank {r}, exit {c}:\n{e}"
                for r, (c, e) in enumerate(zip(codes, ends, strict=True))
            )
            return "\n".join(parts)
        return [torch.load(folder / f"found{rank}") for rank in range(world)]


def found(script: Path, world: int, time_limit: float, name: str, *arguments: str) -> Found:
    """What each rank found under this name; fails where the ranks did."""
    results = outcome(script, world, time_limit, *arguments)
    if isinstance(results, str):
        pytest.fail(results, pytrace=False)
    return [result[name] for result in results]
