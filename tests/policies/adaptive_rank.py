"""One rank of a gloo group: clipping by output unit if parameters are DTensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import BACKENDS
from tests.ranks import join_ranks, leave_ranks

BACKENDS_RUN = [backend for backend in BACKENDS[:2] if backend.why_not() is None]
SHAPES = ((5, 4, 3), (6, 7), (9,), (3, 8))
PLACEMENTS: tuple[Any, ...] = (Shard(0), Replicate(), Replicate(), Shard(0))
STEPS = 4


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def made(params: list[Parameter], **ours: Any) -> Any:
    groups = [{"params": params[:3]}, {"params": params[3:], "clipping": None, "max_norm": 1.0}]
    return sg.optim.SGD(groups, lr=0.5, momentum=0.9, clip=sg.ClipAdaptive(0.05), **ours)


def take_steps(params: list[Parameter], optimizer: Any, place: Any) -> None:
    for step in range(STEPS):
        for param, grad, how in zip(params, values(1 + step), PLACEMENTS, strict=True):
            param.grad = place(grad, how)
        optimizer.step()


def whole(param: Tensor) -> Tensor:
    return param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()


def message_of(placements: tuple[Any, ...], shape: tuple[int, ...], mesh: Any, **group: Any) -> str:
    param = Parameter(distribute_tensor(torch.ones(shape), mesh, placements))
    param.grad = distribute_tensor(torch.ones(shape), mesh, placements)
    named = {"params": [("body.weight", param)], **group}
    try:
        optimizer = sg.optim.SGD([named], lr=0.1, clip=sg.ClipAdaptive())
        optimizer.step()
        if "later" in group:
            optimizer.param_groups[0]["clipping"] = 0.01
            optimizer.step()
    except ValueError as error:
        return str(error)
    return "taken"


def main(rank: int, world: int, folder: Path) -> None:
    join_ranks(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    alone = init_device_mesh("cpu", (1, world))

    def place(tensor: Tensor, how: Any) -> Tensor:
        placed: Tensor = distribute_tensor(tensor, mesh, [how])
        return placed

    found: dict[str, Any] = {}
    for backend in BACKENDS_RUN:
        with backend.active():
            pairs = zip(values(0), PLACEMENTS, strict=True)
            params = [Parameter(place(value, how)) for value, how in pairs]
            optimizer = made(params)
            take_steps(params, optimizer, place)
            found[f"{backend}"] = {
                "weights": [whole(param) for param in params],
                "norm": optimizer.grad_norm,
                "path": optimizer.path,
            }
    found["messages"] = {
        "columns": message_of((Shard(1),), (4, 6), mesh),
        "vector": message_of((Shard(0),), (6,), mesh),
        "rows": message_of((Shard(0),), (4, 6), mesh),
        "replica": message_of((Replicate(),), (6,), mesh),
        "left out": message_of((Shard(1),), (4, 6), mesh, clipping=None),
        "later": message_of((Shard(1),), (4, 6), mesh, clipping=None, later=True),
        "mesh of one": message_of((Shard(1), Shard(0)), (4, 6), alone),
    }
    leave_ranks(found, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
