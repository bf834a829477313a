"""Distribute one training loop over the ranks of ``torchrun`` in the usual ways; the optimizer's line hardly changes.

A small network predicts the next byte of CPython's ``pydoc_data.topics`` at every position. Half-way one rank's loss
becomes NaN, and all ranks skip that step::

    torchrun --standalone --nproc-per-node=2 examples/distributed.py --parallel ddp --check
    torchrun --standalone --nproc-per-node=4 examples/distributed.py --parallel fsdp2_tp --check

``ddp``, ``fsdp2``, ``tp`` and ``pp`` take two or more ranks, ``hsdp`` and ``fsdp2_tp`` an even number of at least four.
Several names run one after the other. ``--check`` trains the same network in one process with torch's own clipping and
optimizer, and compares every norm and weight. Ranks communicate over gloo on the CPU, or over nccl if there is a GPU
for each rank, which nobody has tried yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pydoc_data.topics
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

import steadygrad as sg

BYTES, CONTEXT, WIDTH, HIDDEN, LAYERS = 256, 8, 64, 256, 4
BATCH = 96
RATE, MAX_NORM = 3e-3, 0.5
TOLERANCE = 1e-4  # relative for norms, absolute for weights


class Layer(nn.Module):
    """Adds the output of a hidden layer to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, ``(batch, WIDTH)`` like ``x``."""
        added: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return added


def network() -> nn.Sequential:
    """Return a network from int64 bytes ``(batch, CONTEXT)`` to logits ``(batch, BYTES)``, the same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Embedding(BYTES, WIDTH), nn.Flatten(), nn.Linear(CONTEXT * WIDTH, WIDTH)),
        *(Layer() for _ in range(LAYERS)),
        nn.Linear(WIDTH, BYTES),
    )


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and next bytes for each step, from random places of the text; the same on every rank."""
    topics = pydoc_data.topics.topics
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    pieces = text.unfold(0, CONTEXT + 1, 1)
    generator = torch.Generator().manual_seed(1)
    picked = (torch.randint(len(pieces), (BATCH,), generator=generator) for _ in range(steps))
    return [(pieces[places, :-1], pieces[places, -1]) for places in picked]


@dataclasses.dataclass
class Shared:
    """Holds the part of the network and its training that is on this rank.

    Attributes:
        model: The network, or this rank's stage of it.
        optimizer: The stabilized optimizer.
        loss: Runs backward for inputs and targets and returns a loss; the mean over all ranks is the batch's.
        names: Names in the whole network of this rank's parameters, in the order of the optimizer's.
        part, parts: Index of the part of each batch that this rank takes, and the number of parts.
    """

    model: nn.Module
    optimizer: sg.optim.AdamW
    loss: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
    names: list[str]
    part: int = 0
    parts: int = 1


def shared(
    model: nn.Module, optimizer: sg.optim.AdamW, names: list[str], data: DeviceMesh | None
) -> Shared:
    """Return this rank's part of a training where every rank runs the whole network, on its part of each batch."""

    def loss(inputs: Tensor, targets: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        value = spoil(functional.cross_entropy(model(inputs), targets))
        value.backward()
        return value.detach()

    if data is None:
        return Shared(model, optimizer, loss, names)
    part = data.get_local_rank() if data.ndim == 1 else dist.get_rank()
    return Shared(model, optimizer, loss, names, part, data.size())


def names_of(model: nn.Module) -> list[str]:
    """Return the parameters' names; called before anything wraps the modules and changes them."""
    return [name for name, _ in model.named_parameters()]


def tensor_parallel(model: nn.Sequential, mesh: DeviceMesh) -> None:
    """Shard every layer's hidden units; embedding, norms and head stay plain tensors."""
    for layer in model:
        if isinstance(layer, Layer):
            parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def sharded(model: nn.Sequential, mesh: DeviceMesh) -> None:
    """Apply ``fully_shard`` to every layer, then to the whole model."""
    for module in (*model, model):
        fully_shard(module, mesh=mesh)


def ddp(model: nn.Sequential, device: str) -> Shared:
    """Make replicas, whose gradients backward averages, so that each rank sees the same norm by itself."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    optimizer = sg.optim.AdamW(model.parameters(), lr=RATE, max_norm=MAX_NORM)
    names = names_of(model)
    return shared(nn.parallel.DistributedDataParallel(model), optimizer, names, mesh)


def fsdp2(model: nn.Sequential, device: str) -> Shared:
    """Keep a shard of each parameter on every rank."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    sharded(model, mesh)
    optimizer = sg.optim.AdamW(model.parameters(), lr=RATE, max_norm=MAX_NORM)
    return shared(model, optimizer, names_of(model), mesh)


def hsdp(model: nn.Sequential, device: str) -> Shared:
    """Shard within each half of the ranks, and replicate across the halves."""
    mesh = init_device_mesh(device, (2, dist.get_world_size() // 2), mesh_dim_names=("rep", "dp"))
    sharded(model, mesh)
    optimizer = sg.optim.AdamW(model.parameters(), lr=RATE, max_norm=MAX_NORM)
    return shared(model, optimizer, names_of(model), mesh)


def tp(model: nn.Sequential, device: str) -> Shared:
    """Make DTensors beside plain tensors; torch's own clip_grad_norm_ refuses such a list."""
    tensor_parallel(model, init_device_mesh(device, (dist.get_world_size(),)))
    optimizer = sg.optim.AdamW(model.parameters(), lr=RATE, max_norm=MAX_NORM)
    return shared(model, optimizer, names_of(model), None)


def fsdp2_tp(model: nn.Sequential, device: str) -> Shared:
    """Put parameters on two meshes: layers on both dimensions, the rest sharded over ``dp`` alone."""
    mesh = init_device_mesh(device, (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    sharded(model, mesh["dp"])
    optimizer = sg.optim.AdamW(model.parameters(), lr=RATE, max_norm=MAX_NORM)
    return shared(model, optimizer, names_of(model), mesh["dp"])


def pp(model: nn.Sequential, device: str) -> Shared:
    """Give every rank different parameters; tensors do not tell this, so ``reduce_norm`` does."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    stages, rank = mesh.size(), mesh.get_local_rank()
    first, last = (len(model) * place // stages for place in (rank, rank + 1))
    names = [name for name in names_of(model) if first <= int(name.partition(".")[0]) < last]
    part = model[first:last]
    optimizer = sg.optim.AdamW(part.parameters(), lr=RATE, max_norm=MAX_NORM, reduce_norm=mesh)
    stage = PipelineStage(
        part, rank, stages, next(part.parameters()).device, group=mesh.get_group()
    )

    def loss(inputs: Tensor, targets: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        def of_stage(logits: Tensor, target: Tensor) -> Tensor:
            return spoil(functional.cross_entropy(logits, target))

        schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=of_stage)
        found: list[Tensor] = []
        ends: dict[str, Any] = {"target": targets, "losses": found} if rank == stages - 1 else {}
        schedule.step(*((inputs,) if rank == 0 else ()), **ends)
        # Only the last stage has the loss, so it is multiplied by the number of stages for the mean.
        return stages * torch.stack(found).mean().detach() if found else torch.zeros(())

    return Shared(part, optimizer, loss, names)


WAYS: dict[str, Callable[[nn.Sequential, str], Shared]] = {
    way.__name__: way for way in (ddp, fsdp2, hsdp, tp, fsdp2_tp, pp)
}


def spoiled(loss: Tensor) -> Tensor:
    """Return a NaN in place of the loss, as after an overflow."""
    return loss * torch.nan


def unspoiled(loss: Tensor) -> Tensor:
    """Return the loss unchanged."""
    return loss


def report(text: str) -> None:
    """Print the text on one rank."""
    if dist.get_rank() == 0:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor's elements from all ranks; they are gathered one dimension of the mesh after the other."""
    if isinstance(tensor, DTensor):
        placements = list(tensor.placements)
        for place in range(len(placements)):
            placements[place] = Replicate()
            tensor = tensor.redistribute(placements=placements)
        tensor = tensor.to_local()
    return tensor.detach()


def train(name: str, steps: int, device: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train on all ranks; return the norm of every step, and this rank's parameters, whole, by name."""
    job = WAYS[name](network().to(device), device)
    world = dist.get_world_size()
    norms: list[float] = []
    for step, (inputs, targets) in enumerate(batches(steps)):
        mine = [t.chunk(job.parts)[job.part].to(device) for t in (inputs, targets)]
        spoils = step == steps // 2 and dist.get_rank() == world - 1
        job.optimizer.zero_grad()
        loss = job.loss(mine[0], mine[1], spoiled if spoils else unspoiled).to(device)
        job.optimizer.step()
        norms.append(float(job.optimizer.grad_norm))
        dist.all_reduce(loss)
        if step % 10 == 0 or step in (steps // 2, steps - 1):
            report(
                f"{name}: step {step:3d}  loss {float(loss) / world:7.4f}  norm {norms[-1]:8.4f}  "
                f"skipped {job.optimizer.skipped_steps}"
            )
    params = [param for group in job.optimizer.param_groups for param in group["params"]]
    return norms, {n: whole(param) for n, param in zip(job.names, params, strict=True)}


def trained_alone(steps: int, device: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train in one process with torch's functions, without the skipped batch; return norms and parameters."""
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    norms: list[float] = []
    for step, (inputs, targets) in enumerate(batches(steps)):
        if step == steps // 2:
            norms.append(torch.nan)
            continue
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs.to(device)), targets.to(device)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    return norms, {name: param.detach() for name, param in model.named_parameters()}


def check(
    name: str, norms: list[float], params: dict[str, Tensor], steps: int, device: str
) -> None:
    """Compare norms and parameters with training in one process, on every rank.

    Raises:
        AssertionError: A norm or a weight differs by more than TOLERANCE, or is missing.
    """
    expected_norms, expected = trained_alone(steps, device)
    theirs = torch.tensor(expected_norms)
    mine = torch.tensor(norms)
    torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=0.0, equal_nan=True)
    of_norms = float((mine / theirs - 1).abs().nan_to_num(0.0).max())
    of_weights = 0.0
    for key, param in params.items():
        torch.testing.assert_close(param, expected[key], rtol=0.0, atol=TOLERANCE)
        of_weights = max(of_weights, float((param - expected[key]).abs().max()))
    of_all = torch.tensor([of_norms, of_weights], device=device)
    dist.all_reduce(of_all, op=dist.ReduceOp.MAX)
    report(
        f"{name}: equal to one process: norms differ by {of_all[0]:.1e} of themselves, "
        f"weights by {of_all[1]:.1e}, {dist.get_world_size()} ranks"
    )


def main() -> None:
    """Train in the ways that the command line names; ``torchrun`` starts this on every rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--parallel", nargs="+", choices=list(WAYS), required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--check", action="store_true", help="compare with a single process")
    given = parser.parse_args()
    local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if local_rank < 0:
        parser.error(
            "start it with torchrun --standalone --nproc-per-node=2 examples/distributed.py ..."
        )
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
    world = dist.get_world_size()
    for name in given.parallel:
        least = 4 if name in ("hsdp", "fsdp2_tp") else 2
        if world < least or BATCH % world:
            parser.error(
                f"--parallel {name}: expected {least} ranks or more that divide {BATCH}, got {world}"
            )
        norms, params = train(name, given.steps, device)
        if given.check:
            check(name, norms, params, given.steps, device)
    dist.barrier()  # A rank that leaves early would break the others' communication.
    dist.destroy_process_group()
    # After gloo groups torch's own destructors sometimes abort: "terminate called without an active exception".
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
