"""One rank of a gloo group: optimizers over parts of a whole that are not DTensors."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import steadygrad as sg
from tests.ranks import join_ranks, leave_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch itself uses torch.jit.script there, which is deprecated
    from torch.distributed.optim import ZeroRedundancyOptimizer

Found = dict[str, Any]
STEPS = 4
MAX_NORM = 0.5


def network(layers: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers)))


def backward(model: nn.Module, step: int) -> None:
    """Run backward on the same batch on every rank."""
    model.zero_grad()
    input = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    (50 * model(input).square().mean()).backward()


def wrapped(params: Any, lr: float) -> sg.Stabilizer:
    """Return a wrapped optimizer from a function that is used like a class."""
    return sg.Stabilizer(torch.optim.AdamW(params, lr=lr), max_norm=MAX_NORM)


def of_one_process(layers: int) -> tuple[nn.Module, float]:
    """Train with torch's own clip and optimizer in one process; return the model and the last norm."""
    model = network(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    norm = torch.zeros(())
    for step in range(STEPS):
        backward(model, step)
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    return model, float(norm)


def zero_redundancy(rank: int, layers: int, optimizer_class: Any, **options: Any) -> Found:
    """Train, consolidate, save and load the state on the first rank; return how far off the whole is."""
    model = network(layers)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=optimizer_class, lr=0.1, **options
    )
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
    optimizer.consolidate_state_dict(0)
    saved = 0
    if rank == 0:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state_dict = torch.load(file)  # by default it accepts nothing but tensors and plain values
        saved = len(state_dict["state"])
        optimizer.load_state_dict(state_dict)
    whole, norm = of_one_process(layers)
    return {
        "off": farthest(model.parameters(), whole.parameters()),
        "norm off": abs(float(optimizer.optim.grad_norm) - norm),
        "clipped": optimizer.optim.clipped_steps,
        "held": sum(len(group["params"]) for group in optimizer.optim.param_groups),
        "saved": saved,
    }


def farthest(some: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(some, others, strict=True))


def raised(function: Any) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing"


def fsdp1(use_orig_params: bool, strategy: ShardingStrategy) -> Found:
    """Train under FSDP1 with default options, with the line that the refusal suggests, and with options that fail."""
    whole = network()
    backward(whole, 0)
    model = FullyShardedDataParallel(
        copy.deepcopy(whole),
        use_orig_params=use_orig_params,
        sharding_strategy=strategy,
        device_id=torch.device("cpu"),
    )
    backward(model, 0)
    params = list(model.parameters())
    before = [param.detach().clone() for param in params]
    adamw = partial(sg.optim.AdamW, params, lr=0.1, max_norm=MAX_NORM)
    group = model.process_group
    found: Found = {
        "default": raised(adamw().step),
        "wrapped": raised(sg.Stabilizer(torch.optim.AdamW(params), max_norm=MAX_NORM).step),
        "tensor": raised(adamw(reduce_norm=group, clip_scope="tensor").step),
        "adaptive": raised(sg.optim.AdamW(params, clip=sg.ClipAdaptive(), reduce_norm=group).step),
        "function": raised(lambda: sg.clip_grad_norm_(params, 1.0)),
        "unchanged": all(map(torch.equal, before, params)),
    }
    split = strategy is not ShardingStrategy.NO_SHARD
    optimizer = adamw(reduce_norm=group if split else [None])
    optimizer.step()
    norm = nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
    found["norm off"] = abs(float(optimizer.grad_norm) - float(norm))
    return found


def main(rank: int, world: int, folder: Path) -> None:
    # FSDP1 warns, for example that it switches to NO_SHARD when asked to.
    warnings.simplefilter("ignore")
    join_ranks(rank, world, folder)
    everyone = dist.group.WORLD
    limit: Any = {"max_norm": MAX_NORM}
    clip: Any = {"clip": sg.ClipNorm(MAX_NORM), "nonfinite": "raise"}
    adamw = sg.optim.AdamW
    found = {
        "zero": zero_redundancy(rank, 3, adamw, **limit),
        "zero reduce_norm": zero_redundancy(rank, 3, adamw, **limit, reduce_norm=everyone),
        "zero options": zero_redundancy(rank, 3, adamw, **clip, telemetry=sg.Telemetry()),
        "zero few": zero_redundancy(rank, 1, adamw, **limit),
        "zero wrapper": zero_redundancy(rank, 3, wrapped),
    }
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
        for use_orig_params in (False, True):
            name = f"fsdp1 {strategy.name} {use_orig_params}"
            found[name] = fsdp1(use_orig_params, strategy)
    leave_ranks(found, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
