"""Situations in which ranks have to raise instead of waiting; they come last, since they leave groups behind."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

import steadygrad as sg
from steadygrad.distributed import agreement
from tests.distributed.sharded_layouts import Meshes, TensorTraining, locals_of
from tests.distributed.sharded_situations import message

Found = dict[str, Any]


def sharded(mesh: DeviceMesh, rows: int = 4) -> nn.Parameter:
    """Return a sharded parameter of ones with a gradient of ones, without communication."""
    here = mesh.get_coordinate()
    part = torch.ones(0 if here is None else rows // mesh.size(), 2)
    shape = {"shape": torch.Size((rows, 2)), "stride": (2, 1)}
    lies = [Shard(0)] * mesh.ndim
    param = nn.Parameter(DTensor.from_local(part, mesh, lies, run_check=False, **shape))
    param.grad = DTensor.from_local(part.clone(), mesh, lies, run_check=False, **shape)
    return param


def refused_step(params: list[torch.Tensor], groups: Any = None, **options: Any) -> Found:
    optimizer = sg.optim.AdamW(groups or params, lr=0.1, **options)
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
    """Use the same meshes everywhere, but other parameters on the last rank."""
    last = rank == world - 1
    shapes = [sharded(meshes.flat, 8 if last else 4), sharded(meshes.flat)]
    plain = nn.Parameter(torch.ones(2))
    return {
        "shape": refused_step(shapes),
        "count": refused_step([sharded(meshes.flat), *([plain] if last else [])]),
        "function": message(lambda: sg.clip_grad_norm_(shapes, 1.0)),
    }


def other_meshes(rank: int, world: int, meshes: Meshes) -> Found:
    """Use meshes over different ranks on each rank, so that each would wait for one that waits for another."""
    if world != 4:
        return {}
    pair, all_ranks = [0, 1], [0, 1, 2, 3]
    reaches = all_ranks if rank in (1, 2) else pair if rank == 0 else [2, 3]
    return refused_step([sharded(DeviceMesh("cpu", reaches, _init_backend=False))])


def other_groups(rank: int, world: int, meshes: Meshes) -> Found:
    """Use the same parameters, but in one param group on the last rank."""
    params = [sharded(meshes.flat), sharded(meshes.flat, 8)]
    groups = [{"params": params}]
    if rank != world - 1:
        groups = [{"params": params[:1]}, {"params": params[1:]}]
    found = {"split": refused_step(params, groups=groups)}
    if world == 4:
        flat = DeviceMesh("cpu", [0, 1, 2, 3], _init_backend=False)
        square = DeviceMesh("cpu", [[0, 1], [2, 3]], _init_backend=False)
        found["mesh"] = refused_step([sharded(square if rank == 3 else flat)])
    return found


# By option: what the other ranks have, and what the last one has.
OTHER_OPTIONS = {
    "norm_type": (2.0, torch.inf),
    "clip_scope": ("global", "tensor"),
    "nonfinite": ("raise", "skip"),
    "max_norm": (1.0, 2.0),
    "l1": (0.0, 0.5),
    "l1_mode": ("subgradient", "proximal"),
    "penalty_order": ("before_clip", "after_clip"),
    "rounding": ("nearest", "kahan"),
    "reduce_norm": (None, "everyone"),
}


def other_options(rank: int, world: int, meshes: Meshes) -> Found:
    """Give the last rank other options; without DTensors only those that collectives depend on matter."""
    last = rank == world - 1
    found = {}
    for name, values in OTHER_OPTIONS.items():
        value = dist.group.WORLD if values[last] == "everyone" else values[last]
        found[name] = refused_step([sharded(meshes.flat)], **{name: value})
    plain = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for param in plain:
        param.grad = torch.ones(2)
    everyone = dist.group.WORLD
    shared: Found = {"norm_type": 5.0}  # a value that was not agreed on before
    found["stages: clip_scope"] = refused_step(
        plain, reduce_norm=everyone, clip_scope="tensor" if last else "global", **shared
    )
    groups = [{"params": plain[:1]}, {"params": plain[1:]}]
    found["stages: reduce_norm"] = refused_step(
        plain, groups=groups, reduce_norm=[everyone if last else None, everyone], norm_type=7.0
    )
    return found


def master_of_double(rank: int, world: int, meshes: Meshes) -> Found:
    param = sharded(meshes.flat)
    wide = nn.Parameter(param.detach().double())
    wide.grad = param.grad.double()
    plain = nn.Parameter(torch.ones(2, dtype=torch.float64))
    plain.grad = torch.ones(2, dtype=torch.float64)
    found = {
        "sharded": refused_step([param, wide], rounding="master"),
        "plain": refused_step([param, plain], rounding="master"),
    }
    # The next step of all ranks succeeds as if nothing had happened.
    optimizer = sg.optim.AdamW([param], lr=0.1, rounding="master")
    optimizer.step()
    return {**found, "norm": float(optimizer.grad_norm)}


def a_rank_that_does_not_come(rank: int, world: int, meshes: Meshes) -> Found:
    """Step alone on the last rank, which has no DTensor at all."""
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
    other_groups,
    other_options,
    master_of_double,
    a_rank_that_does_not_come,
)
