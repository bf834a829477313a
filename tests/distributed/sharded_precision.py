"""Half precision, accumulation and loss scaling of sharded parameters; each function runs on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import steadygrad as sg
from tests.distributed.checkpoint_cases import Case, contents, give, like, network, train
from tests.distributed.sharded_layouts import Meshes, local, whole

Found = dict[str, Any]

HALF_CASES = [
    Case("AdamW", "wrapper", dtype, rounding, state_dtype)
    for dtype, rounding, state_dtype in (
        (torch.bfloat16, "nearest", None),
        (torch.bfloat16, "master", torch.float32),
        (torch.bfloat16, "kahan", torch.float32),
        (torch.float16, "kahan", None),
        (torch.bfloat16, "stochastic", None),
    )
]
SCALED_STEPS = 20
MICRO_BATCHES = 3
ELEMENTS = 1 << 14


def half_precision(rank: int, world: int, meshes: Meshes) -> Found:
    """Step with gradients that were made by hand; in one step one rank has a NaN."""
    found: Found = {}
    for case in HALF_CASES:
        runs = []
        for _ in range(2 if case.rounding == "stochastic" else 1):
            net = network(case, seed=1)
            fully_shard(net, mesh=meshes.flat)
            optimizer = case.optimizer(net)
            train(net, optimizer, range(6))
            runs.append(contents(net, optimizer))
        found[str(case)] = runs
    return found


def rounded_by_chance(rank: int, world: int, meshes: Meshes) -> Found:
    """Move a sharded and a replicated parameter by a quarter of their last bit."""
    found: Found = {}
    for name, placement in (("sharded", Shard(0)), ("replicated", Replicate())):
        ones = torch.ones(ELEMENTS, dtype=torch.bfloat16)
        param = nn.Parameter(distribute_tensor(ones, meshes.flat, [placement], src_data_rank=None))
        optimizer = sg.optim.SGD([param], lr=2.0**-9, rounding="stochastic", rounding_seed=3)
        param.grad = like(param, -ones)
        optimizer.step()  # a step of 2^-9, where numbers are 2^-7 apart
        found[name] = local(param).detach().clone()
    return found


def product(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(6, 9, bias=False)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-99, 100, (9, 6), generator=generator) / 64)
    return layer.to(dtype)


def micro_batch(number: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a micro-batch that is so small that all sums of gradients are exact."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    input = torch.randint(-2, 3, (1, 6), generator=generator) / 4
    weight = torch.randint(-2, 3, (1, 9), generator=generator) / 2
    return input.to(dtype), weight.to(dtype)


def accumulated(rank: int, world: int, meshes: Meshes) -> Found:
    """Accumulate micro-batches under fully_shard, whose sums in float32 are DTensors."""
    found: Found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for sync in (True, False):
            layer = product(dtype)
            fully_shard(layer, mesh=meshes.flat)
            optimizer = sg.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, max_norm=0.25)
            kinds = set()
            for step in range(2):
                for number in range(MICRO_BATCHES):
                    last = number == MICRO_BATCHES - 1
                    layer.set_requires_gradient_sync(sync or last)
                    with sg.accumulate(optimizer):
                        input, weight = micro_batch(3 * step + number, rank, dtype)
                        (layer(input) * weight).sum().backward()
                    kinds |= {(type(s), s.dtype) for s in optimizer.accumulated.sums.values()}
                optimizer.step()
                optimizer.zero_grad()
            found[f"{dtype} {sync}"] = {
                "weight": whole(layer.weight),
                "norm": float(optimizer.grad_norm),
                "sums": [(kind.__name__, str(dtype)) for kind, dtype in kinds],
            }
    return found


def spoilt(step: int) -> bool:
    return step in (0, 5, 6, 13)


def scale_up(net: nn.Module, scale: float, step: int, rank: int) -> None:
    """Scale gradients as backward of a scaled loss does; in spoilt steps they are infinite on one rank."""
    give(net, step + 3)
    for param in net.parameters():
        param.grad.mul_(scale)
    if spoilt(step) and rank == 1:
        local(next(net.parameters()).grad).view(-1)[0] = torch.inf


def scaled(rank: int, world: int, meshes: Meshes) -> Found:
    """Scale losses with both scalers, whose scales have to stay the same on all ranks."""
    found: Found = {}
    for kind in ("ours", "torch"):
        for unscaled in (False, True):
            case = Case("AdamW", "wrapper")
            net = network(case, seed=1)
            fully_shard(net, mesh=meshes.flat)
            optimizer = case.optimizer(net)
            scalers = {"ours": sg.GradScaler, "torch": torch.amp.GradScaler}
            scaler = scalers[kind]("cpu", init_scale=2.0**16, growth_interval=4)
            scales = []
            for step in range(SCALED_STEPS):
                scale_up(net, scaler.get_scale(), step, rank)
                scaler.scale(torch.ones(()))  # a loss is scaled, too
                if unscaled:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            found[f"{kind} {unscaled}"] = {"scales": scales, **contents(net, optimizer)}
    return found


def stages_scaled(rank: int, world: int, meshes: Meshes) -> Found:
    """Step with different parameters on each rank, where torch's scaler would back off on one of them alone."""
    net = network(Case("SGD", "wrapper"), seed=rank)
    optimizer = sg.optim.SGD(net.parameters(), lr=0.1, max_norm=1.0, reduce_norm=meshes.flat)
    scaler = sg.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    scales = []
    for step in range(SCALED_STEPS):
        scale_up(net, scaler.get_scale(), step, rank)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {"scales": scales, "skipped": optimizer.skipped_steps}


def warm_up_from_nothing(rank: int, world: int, meshes: Meshes) -> Found:
    """Take a first step with learning rate 0 and a gradient on one rank, which is not a step that creates state."""
    ones = torch.ones(8, 2, dtype=torch.bfloat16)
    param = nn.Parameter(distribute_tensor(ones, meshes.flat, [Shard(0)], src_data_rank=None))
    param.grad = like(param, torch.cat([ones[:1], 0 * ones[1:]]))
    optimizer = sg.optim.SGD([param], lr=0.0, momentum=0.9, rounding="stochastic")
    optimizer.step()
    norm, rounded = optimizer.grad_norm, optimizer.state_dict()["param_groups"][0]["rounded_steps"]
    return {"norm": None if norm is None else float(norm), "rounded": rounded}


def mixed_precision(rank: int, world: int, meshes: Meshes) -> Found:
    """Use fully_shard's mixed precision: parameters in float32, everything else in bf16."""
    layer = product(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(layer, mesh=meshes.flat, mp_policy=policy)
    optimizer = sg.optim.AdamW(layer.parameters(), lr=0.1, max_norm=0.25)
    for step in range(4):
        input, weight = micro_batch(step, rank, torch.float32)
        (layer(input) * weight).sum().backward()
        assert isinstance(layer.weight.grad, DTensor)
        optimizer.step()
        optimizer.zero_grad()
    return {"weight": whole(layer.weight), "path": optimizer.path}


def data_parallel_accumulation(rank: int, world: int, meshes: Meshes) -> Found:
    """Accumulate under DistributedDataParallel, all but the last micro-batch in no_sync; one rank overflows."""
    model = nn.parallel.DistributedDataParallel(product(torch.float32))
    optimizer = sg.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, max_norm=0.25)
    scaler = sg.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        for number in range(MICRO_BATCHES):
            last = number == MICRO_BATCHES - 1
            with sg.accumulate(optimizer):
                if last:
                    loss(model, scaler, step, number, rank).backward()
                else:
                    with model.no_sync():
                        loss(model, scaler, step, number, rank).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {
        "weight": model.module.weight.detach().clone(),
        "norm": float(optimizer.grad_norm),
        "skipped": optimizer.skipped_steps,
        "scale": scaler.get_scale(),
    }


def loss(model: Any, scaler: Any, step: int, number: int, rank: int) -> Tensor:
    input, weight = micro_batch(3 * step + number, rank, torch.float32)
    if (step, number, rank) == (1, 0, 1):
        weight = weight * torch.inf  # gives infinity and NaN
    scaled: Tensor = scaler.scale((model(input) * weight).sum())
    return scaled


PRECISION = (
    half_precision,
    rounded_by_chance,
    accumulated,
    scaled,
    stages_scaled,
    warm_up_from_nothing,
    mixed_precision,
    data_parallel_accumulation,
)
