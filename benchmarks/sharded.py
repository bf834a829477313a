"""Times clipping of many small DTensors over gloo ranks beside torch's, in one run.

Every rank is a process on this machine. Calls are interleaved, and a round takes as long as its slowest rank. Each time
is the median of the rounds beside the least one, which others on the machine disturb less. torch's issue 169445 reports
that its time grows with the square of the number of tensors: several counts show whether it does here. Prints one JSON
object, or writes it to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import steadygrad as sg
from benchmarks.environment import this_machine

# Elements of a tensor on one rank.
_SHARD = 32


def _parameters(count: int, world: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(dist.get_rank())
    params: list[Tensor] = []
    for _ in range(count):
        values, grads = (torch.randn(_SHARD, generator=generator) for _ in range(2))
        param = nn.Parameter(DTensor.from_local(values, mesh, [Shard(0)], run_check=False))
        param.grad = DTensor.from_local(grads, mesh, [Shard(0)], run_check=False)
        params.append(param)
    return params


def _seconds(call: Callable[[], object]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    call()
    spent = torch.tensor([time.perf_counter() - begin])
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def _local(params: list[Tensor]) -> list[Tensor]:
    """The same as plain tensors, without anything to reduce: what remains is the price of sharding."""
    plain: list[Tensor] = []
    for param in params:
        assert isinstance(param, DTensor) and isinstance(param.grad, DTensor)
        tensor = nn.Parameter(param.to_local().detach().clone())
        tensor.grad = param.grad.to_local().clone()
        plain.append(tensor)
    return plain


Times = dict[str, dict[str, float]]


def _measure(count: int, world: int, rounds: int) -> Times:
    params = _parameters(count, world)
    plain = _local(params)
    optimizer = sg.optim.AdamW(params, lr=1e-6, max_norm=1e9)
    tiny = 1e-3  # the clip is active in every call

    candidates: dict[str, Callable[[], object]] = {
        "torch clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(params, tiny),
        "steadygrad clip_grad_norm_": lambda: sg.clip_grad_norm_(params, tiny),
        "steadygrad clip_grad_norm_, plain tensors": lambda: sg.clip_grad_norm_(plain, tiny),
        "steadygrad AdamW step": optimizer.step,
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        _seconds(call)  # plans, agreement, torch's caches of sharding decisions
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(_seconds(call))
    return {
        name: {"median": 1e3 * statistics.median(spent), "least": 1e3 * min(spent)}
        for name, spent in times.items()
    }


def _report(found: dict[int, Times], world: int, rounds: int) -> str:
    now = datetime.now(timezone.utc)
    report = {
        "created": now.isoformat(timespec="seconds"),
        "environment": asdict(this_machine()),
        "ranks": world,
        "elements": _SHARD,
        "rounds": rounds,
        "milliseconds": found,
    }
    return json.dumps(report, indent=2) + "\n"


def _run_rank(
    rank: int, world: int, folder: Path, counts: list[int], rounds: int, out: Path | None
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),
    )
    found = {count: _measure(count, world, rounds) for count in counts}
    if rank == 0:
        text = _report(found, world, rounds)
        if out is None:
            sys.stdout.write(text)
        else:
            out.write_text(text, encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    # After gloo groups torch's own destructors abort now and then, "terminate called without an active exception".
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Starts the ranks, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a file, in the place of the terminal")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        _run_rank(given.rank, given.ranks, given.folder, given.counts, given.rounds, given.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.sharded", *sys.argv[1:], "--folder", folder]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment)
            for rank in range(given.ranks)
        ]
        codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


if __name__ == "__main__":
    main()
