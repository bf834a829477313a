"""One rank of a gloo group: telemetry of parameters that are sharded, replicated, or different on every rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import steadygrad as sg
from tests.backends import BACKENDS
from tests.ranks import join_ranks, leave_ranks

BACKENDS_RUN = [backend for backend in BACKENDS[:2] if backend.why_not() is None]
SCOPES = ("global", "group", "tensor")
SHAPES = ((4, 3), (1, 3), (5,))
STEPS = 6
BAD_STEP = 4


def gradients(step: int) -> list[torch.Tensor]:
    """Return gradients of whole parameters."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def in_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "max_norm": 1.0}, {"params": params[2:], "max_norm": 0.5}]


def is_bad(step: int, index: int) -> bool:
    return step == BAD_STEP and index == 0


def sharded(scope: Any) -> sg.History:
    """Return the history of a run whose second parameter is empty on one rank of two, and whose third is replicated."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = [[Shard(0)], [Shard(0)], [Replicate()]]
    params = [
        nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placement))
        for shape, placement in zip(SHAPES, placements, strict=True)
    ]
    opt = sg.optim.SGD(in_groups(params), lr=0.1, clip_scope=scope, telemetry="tensor")
    for step in range(STEPS):
        for i, (param, grad) in enumerate(zip(params, gradients(step), strict=True)):
            if is_bad(step, i):
                grad[-1, -1] = torch.nan
            param.grad = distribute_tensor(grad, mesh, placements[i])
        opt.step()
    history: sg.History = opt.report().history
    return history


def main(rank: int, world: int, folder: Path) -> None:
    join_ranks(rank, world, folder)
    found = {}
    for backend in BACKENDS_RUN:
        with backend.active():
            for scope in SCOPES:
                rows = torch.from_numpy(sharded(scope)._rows.copy())
                found[f"{backend}-{scope}"] = {"rows": rows}
    leave_ranks(found, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
