"""The layouts of tests/sharded_cases.py on the ranks that share them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.distributed.sharded_cases import (
    FIRST_GROUP,
    Network,
    batch,
    groups_of,
    whole_grads,
    whole_params,
)

Place = tuple[DeviceMesh, list[Placement]] | None  # None for a plain tensor


class Meshes:
    """The meshes of the tests, made once, since all ranks have to take part."""

    def __init__(self, world: int) -> None:
        self.flat = init_device_mesh("cpu", (world,), mesh_dim_names=("flat",))
        if world == 4:
            self.square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            self._rows = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]

    def row(self, number: int) -> DeviceMesh:
        """Return a mesh of half of the four ranks."""
        return self._rows[number]


def shared_network(layout: str, meshes: Meshes) -> tuple[Network, int, int]:
    """Return the network, and the number of this rank's part of a batch among how many."""
    network = Network()
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "tp":
        parallelize_module(network, meshes.flat, plan)
        return network, 0, 1
    if layout == "fsdp_tp":
        parallelize_module(network, meshes.square["tp"], plan)
        mesh = meshes.square["dp"]
    else:
        mesh = meshes.flat if layout == "fsdp" else meshes.square
    for module in (network.up, network.down, network):
        fully_shard(module, mesh=mesh)
    if layout == "fsdp_tp":
        return network, mesh.get_local_rank(), mesh.size()
    return network, dist.get_rank(), dist.get_world_size()


class NetworkTraining:
    """Training whose gradients come from backward, with this rank's part of the batch."""

    def __init__(self, layout: str, meshes: Meshes) -> None:
        self.network, self.part, self.parts = shared_network(layout, meshes)
        self.groups = groups_of(self.network)
        self.params = [p for group in self.groups for p in group["params"]]

    def backward(self, step: int) -> None:
        self.network.zero_grad()
        input, target = (t.chunk(self.parts)[self.part] for t in batch(step))
        nn.functional.mse_loss(self.network(input), target).backward()


def places(meshes: Meshes, world: int) -> list[Place]:
    flat = meshes.flat
    if world == 2:
        return [
            (flat, [Shard(0)]),
            (flat, [Shard(0)]),
            (flat, [Shard(1)]),
            (flat, [Replicate()]),
            None,
            (flat, [Shard(1)]),
            None,
        ]
    square = meshes.square
    return [
        (flat, [Shard(0)]),
        (square, [Replicate(), Shard(0)]),
        (square, [Shard(0), Shard(1)]),
        (square["tp"], [Shard(0)]),
        None,
        (square, [Replicate(), Replicate()]),
        None,
    ]


def placed(whole: Tensor, place: Place) -> Tensor:
    if place is None:
        return whole.clone()
    tensor: Tensor = distribute_tensor(whole, *place, src_data_rank=None)
    return tensor


def in_parts(whole: Tensor, place: Place) -> Tensor:
    """Return a partial sum, of which every rank of the mesh has a different part."""
    assert place is not None
    mesh = place[0]
    share = (mesh.get_local_rank(0) + 1) / sum(range(mesh.size(0) + 1))
    placements = [Partial(), *place[1][1:]]
    tensor: Tensor = DTensor.from_local(share * whole, mesh, placements, run_check=False)
    return tensor


class TensorTraining:
    """Training whose parameters and gradients are made by hand."""

    def __init__(self, meshes: Meshes, world: int) -> None:
        self.places = places(meshes, world)
        # This is the gradient that every rank of its mesh has.
        self.summed = next(
            i
            for i, place in enumerate(self.places)
            if place is not None and all(p.is_replicate() for p in place[1])
        )
        self.params = [
            nn.Parameter(placed(whole, place))
            for whole, place in zip(whole_params(), self.places, strict=True)
        ]
        self.groups: list[dict[str, Any]] = [
            {"params": self.params[:FIRST_GROUP]},
            {"params": self.params[FIRST_GROUP:]},
        ]

    def backward(self, step: int) -> None:
        whole = zip(self.params, whole_grads(step), self.places, strict=True)
        for i, (param, grad, place) in enumerate(whole):
            in_turn = i == self.summed and step % 2 == 1
            param.grad = in_parts(grad, place) if in_turn else placed(grad, place)


Training = NetworkTraining | TensorTraining


def training(layout: str, meshes: Meshes, world: int) -> Training:
    return TensorTraining(meshes, world) if layout == "tensors" else NetworkTraining(layout, meshes)


def whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def locals_of(params: list[Tensor]) -> list[Tensor]:
    """Return copies, to see later that nothing has changed."""
    with torch.no_grad():
        return [local(param).clone() for param in params]
