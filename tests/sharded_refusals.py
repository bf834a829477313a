"""What ranks must be told instead of waiting for each other; these come last, since they leave groups behind."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

import steadygrad as sg
from sharded_layouts import Meshes, TensorTraining, locals_of
from sharded_situations import message
from steadygrad.distributed import agreement

Found = dict[str, Any]


def sharded(mesh: DeviceMesh, rows: int = 4) -> nn.Parameter:
    """A parameter of ones with a gradient of ones; nothing is sent."""
    here = mesh.get_coordinate()
    part = torch.ones(0 if here is None else rows // mesh.size(), 2)
    shape = {"shape": torch.Size((rows, 2)), "stride": (2, 1)}
    param = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False, **shape))
    param.grad = DTensor.from_local(part.clone(), mesh, [Shard(0)], run_check=False, **shape)
    return param


def refused_step(params: list[torch.Tensor], **options: Any) -> Found:
    optimizer = sg.optim.AdamW(params, lr=0.1, **options)
    before = locals_of(params)
    began = time.monotonic()
    raised = message(optimizer.step)
    return {
        "raised": raised,
        "seconds": time.monotonic() - began,
        "unchanged": all(map(torch.equal, before, locals_of(params))) and not optimizer.state,
    }


def destroyed_groups(rank: int, world: int, meshes: Meshes) -> Found:
    group = dist.new_group(list(range(world)))
    mesh = DeviceMesh.from_group(dist.new_group(list(range(world))), "cpu")
    trained = TensorTraining(meshes, world)
    trained.backward(0)
    optimizer = sg.optim.AdamW([sharded(mesh)], lr=0.1)
    optimizer.step()
    params = optimizer.param_groups[0]["params"]
    sg.clip_grad_norm_(params, 1.0)
    before = locals_of(params)
    dist.destroy_process_group(mesh.get_group())
    dist.destroy_process_group(group)
    return {
        "option": refused_step(trained.params, reduce_norm=group),
        "step": message(optimizer.step),
        "function": message(lambda: sg.clip_grad_norm_(params, 1.0)),
        "unchanged": all(map(torch.equal, before, locals_of(params))),
    }


def wrong_arguments(rank: int, world: int, meshes: Meshes) -> Found:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    partial = nn.Parameter(DTensor.from_local(torch.ones(2), meshes.flat, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(2), meshes.flat, [Partial()])
    found = {
        "name": refused_step([param], reduce_norm="pp"),
        "count": refused_step([param], reduce_norm=[None, None]),
        "partial": refused_step([partial]),
    }
    if world == 4:
        found["mesh"] = refused_step([param], reduce_norm=meshes.square)
    strangers = dist.new_group([0])
    if rank != 0:
        found["stranger"] = refused_step([param], reduce_norm=[strangers])
    return found


def other_tensors(rank: int, world: int, meshes: Meshes) -> Found:
    """The same meshes everywhere, but not the same parameters on the last rank."""
    last = rank == world - 1
    shapes = [sharded(meshes.flat, 8 if last else 4), sharded(meshes.flat)]
    plain = nn.Parameter(torch.ones(2))
    return {
        "shape": refused_step(shapes),
        "count": refused_step([sharded(meshes.flat), *([plain] if last else [])]),
        "function": message(lambda: sg.clip_grad_norm_(shapes, 1.0)),
    }


def other_meshes(rank: int, world: int, meshes: Meshes) -> Found:
    """Ranks whose meshes reach differently far, so that each would wait for one that is elsewhere."""
    if world != 4:
        return {}
    pair, all_ranks = [0, 1], [0, 1, 2, 3]
    reaches = all_ranks if rank in (1, 2) else pair if rank == 0 else [2, 3]
    return refused_step([sharded(DeviceMesh("cpu", reaches, _init_backend=False))])


def a_rank_that_does_not_come(rank: int, world: int, meshes: Meshes) -> Found:
    """The last one has no DTensor at all, and steps on its own."""
    limit, agreement.TIME_LIMIT = agreement.TIME_LIMIT, 2.0
    try:
        last = rank == world - 1
        plain = nn.Parameter(torch.ones(2))
        plain.grad = torch.ones(2)
        return refused_step([plain if last else sharded(meshes.flat, 12)])
    finally:
        agreement.TIME_LIMIT = limit


REFUSALS = (
    destroyed_groups,
    wrong_arguments,
    other_tensors,
    other_meshes,
    a_rank_that_does_not_come,
)
