"""Time clipping of many small DTensors over gloo ranks beside torch.

    torchrun --nproc-per-node 2 -m benchmarks.sharded

Every rank is a process on this machine. Calls are interleaved, and a round takes as long as its
slowest rank. The program reports the median over rounds and the least time, which other processes
disturb less. torch's issue 169445 reports that torch's time grows with the square of the number of
tensors; several numbers of tensors show whether it does here. The program prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import steadygrad as sg
from benchmarks.environment import this_machine
from benchmarks.timer import Candidate, Race
from study.record import now

COUNTS, ROUNDS = (250, 500, 1000, 2000), 15
# Number of elements of a tensor on one rank.
_SHARD = 32


def _measure(count: int) -> dict[str, dict[str, float]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(dist.get_rank())
    params: list[Tensor] = []
    # Plain tensors need no reduction; the difference to them is the cost of sharding.
    plain: list[Tensor] = []
    for _ in range(count):
        values, grads = (torch.randn(_SHARD, generator=generator) for _ in range(2))
        plain.append(nn.Parameter(values.clone()))
        plain[-1].grad = grads.clone()
        params.append(nn.Parameter(DTensor.from_local(values, mesh, [Shard(0)], run_check=False)))
        params[-1].grad = DTensor.from_local(grads, mesh, [Shard(0)], run_check=False)
    optimizer = sg.optim.AdamW(params, lr=1e-6, max_norm=1e9)
    tiny = 1e-3  # the clip is active in every call
    calls = {
        "torch clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(params, tiny),
        "steadygrad clip_grad_norm_": lambda: sg.clip_grad_norm_(params, tiny),
        "steadygrad clip_grad_norm_, plain tensors": lambda: sg.clip_grad_norm_(plain, tiny),
        "steadygrad AdamW step": optimizer.step,
    }
    race = Race([Candidate(name, call, prepare=dist.barrier) for name, call in calls.items()])
    race.warm_up(1)  # makes plans and fills torch's caches of sharding decisions
    laps = torch.tensor([timing.wall for timing in race.run(0.0, ROUNDS, ROUNDS)])
    dist.all_reduce(laps, op=dist.ReduceOp.MAX)
    return {
        name: {"median": 1e3 * float(own.quantile(0.5)), "least": 1e3 * float(own.min())}
        for name, own in zip(calls, laps, strict=True)
    }


def main() -> None:
    argparse.ArgumentParser(prog="benchmarks.sharded", description=__doc__).parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {count: _measure(count) for count in COUNTS}
    if dist.get_rank() == 0:
        about = {"created": now(), "environment": this_machine(), "ranks": dist.get_world_size()}
        numbers = {"elements": _SHARD, "rounds": ROUNDS, "milliseconds": found}
        sys.stdout.write(json.dumps({**about, **numbers}, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    # After gloo groups were used, torch's destructors sometimes abort ("terminate called without an
    # active exception"), so the process ends without them.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
