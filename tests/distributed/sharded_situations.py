"""Situations of ranks that share parameters, besides training; each function runs on all ranks, on every backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import steadygrad as sg
from tests.distributed.sharded_layouts import Meshes, TensorTraining, local, locals_of, whole
from tests.optim import unfused

Found = dict[str, Any]


def message(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def stepped_with(
    optimizer: torch.optim.Optimizer, params: list[Tensor], spoil: Callable[[], None]
) -> Found:
    """Take a good step, then one whose gradients this rank has spoilt, then a good one."""
    optimizer.step()
    before = locals_of(params)
    spoil()
    raised = message(optimizer.step)
    unchanged = all(map(torch.equal, before, locals_of(params)))
    return {
        "raised": raised,
        "unchanged": unchanged,
        "norm": optimizer.grad_norm,
        "skipped": optimizer.skipped_steps,
        "steps": [float(s["step"]) for s in optimizer.state.values() if "step" in s],
        "finite": all(bool(local(p).isfinite().all()) for p in params),
        "weights": [whole(p) for p in params],
    }


def nan_on_one_rank(rank: int, world: int, meshes: Meshes) -> Found:
    """Put a NaN into every kind of parameter, under every policy, also where no rank counts it."""
    found: Found = {}
    for policy in ("skip", "zero", "raise", "propagate"):
        for place in range(7):
            if policy != "skip" and place not in (0, 4):
                continue
            trained = TensorTraining(meshes, world)
            options = {"nonfinite": policy, "max_norm": 1.0}
            optimizer = sg.optim.AdamW(trained.groups, lr=0.1, **options)

            def spoil(trained: TensorTraining = trained, place: int = place) -> None:
                trained.backward(2)
                part = local(trained.params[place].grad)
                if rank == 1 and part.numel() > 0:
                    part.view(-1)[-1] = torch.nan
                elif rank == 1:  # this rank has no part of the parameter
                    local(trained.params[0].grad).view(-1)[0] = torch.nan

            trained.backward(0)
            found[f"{policy} {place}"] = stepped_with(optimizer, trained.params, spoil)
    return found


def infinity_found_on_one_rank(rank: int, world: int, meshes: Meshes) -> Found:
    """Let a gradient scaler report an overflow that it has found on its own rank alone."""
    trained = TensorTraining(meshes, world)
    optimizer = sg.optim.AdamW(trained.groups, lr=0.1, max_norm=1.0)

    def spoil() -> None:
        optimizer.grad_scale = torch.tensor(2.0)
        optimizer.found_inf = torch.tensor(float(rank == 1))

    trained.backward(0)
    return stepped_with(optimizer, trained.params, spoil)


def ranks_without_gradients(rank: int, world: int, meshes: Meshes) -> Found:
    found: Found = {}
    for absent in ((1,), tuple(range(world))):
        trained = TensorTraining(meshes, world)
        optimizer = sg.optim.SGD(trained.groups, lr=0.1, momentum=0.9, max_norm=1.0)
        trained.backward(0)
        if rank in absent:
            for param in trained.params:
                param.grad = None
        optimizer.step()
        clipped = sg.clip_grad_norm_(trained.params, 1e9)
        found[str(len(absent))] = {
            "norm": float(optimizer.grad_norm),
            "function": float(clipped),
            "grads": [p.grad is not None for p in trained.params],
            "counted": [None if p.grad is None else local(p.grad).clone() for p in trained.params],
        }
    return found


def functions(rank: int, world: int, meshes: Meshes) -> Found:
    trained = TensorTraining(meshes, world)
    params = trained.params
    trained.backward(0)
    found: Found = {"mixed": message(lambda: nn.utils.clip_grad_norm_(params, 1.0))}
    for p in (2.0, 1.0, torch.inf, 3.0, 0.0, -torch.inf, -2.0):
        trained.backward(0)
        found[f"clip {p:g}"] = sg.clip_grad_norm_(params, 0.5, p)
        found[f"clipped {p:g}"] = [whole(param.grad) for param in params]
        trained.backward(1)  # one of the gradients is a partial sum
        found[f"norm {p:g}"] = sg.get_total_norm([param.grad for param in params], p)
    trained.backward(0)
    with CommDebugMode() as mode:
        sg.clip_grad_norm_(params, 0.5)
        sg.get_total_norm([param.grad for param in params])
    found["collectives"] = mode.get_total_counts()
    trained.backward(0)
    sg.clip_grads_with_norm_(params, 1.0, 4.0)
    found["with norm"] = [whole(param.grad) for param in params]
    sharded = [param.grad for param in params if isinstance(param, DTensor)][:1]
    norm = nn.utils.get_total_norm(sharded)
    assert isinstance(norm, DTensor)
    sg.clip_grads_with_norm_(params, 1e-3, norm)
    found["with dtensor"] = [whole(param.grad) for param in params]
    trained.backward(0)
    versions = [param.grad._version for param in params]
    sg.clip_grad_value_([*params, params[0]], 0.25)
    found["value"] = [whole(param.grad) for param in params]
    found["versions"] = [
        after > before
        for after, before in zip([p.grad._version for p in params], versions, strict=True)
    ]
    trained.backward(0)
    found["penalty"] = sg.add_penalty_(params, l1=0.1, l2=0.2)
    found["penalised"] = [whole(param.grad) for param in params]
    sg.soft_threshold_(params, 0.3)
    found["thresholded"] = [whole(param) for param in params]
    if rank == 1:
        local(params[0].grad).view(-1)[0] = torch.inf
    before = locals_of([param.grad for param in params])
    found["refused"] = message(lambda: sg.clip_grad_norm_(params, 0.5, error_if_nonfinite=True))
    after = locals_of([param.grad for param in params])
    found["unchanged"] = all(
        torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.isfinite().all()
    )
    return found


def options_of_a_step(rank: int, world: int, meshes: Meshes) -> Found:
    """Use every elementwise option on shards."""
    trained = TensorTraining(meshes, world)
    options = {"l1": 0.05, "l2": 0.1, "clip_value": 0.3, "l1_mode": "proximal", "write_grads": True}
    optimizer = sg.optim.SGD(
        trained.groups, lr=0.1, max_norm=5.0, penalty_order="after_clip", **options
    )
    in_place = TensorTraining(meshes, world)
    wrapped = sg.Stabilizer(
        unfused.Adadelta(in_place.groups, lr=1.0), max_norm=5.0, l1=0.05, l1_mode="proximal"
    )
    for step in range(3):
        trained.backward(step)
        optimizer.step()
        in_place.backward(step)
        wrapped.step()
    return {
        "weights": [whole(p) for p in trained.params],
        "grads": [whole(p.grad) for p in trained.params],
        "in place": [whole(p) for p in in_place.params],
        "path": wrapped.path,
    }


def pipeline_and_experts(rank: int, world: int, meshes: Meshes) -> Found:
    """Step with plain parameters, some different on each rank and some not, in any number per rank."""
    found: Found = {}
    for scope, p in (("global", 2.0), ("group", 2.0), ("global", 3.0), ("group", torch.inf)):
        generator = torch.Generator().manual_seed(7)
        shared = nn.Parameter(torch.randn(5, generator=generator))
        shared.grad = torch.randn(5, generator=generator)
        generator.manual_seed(20 + rank)
        own = [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(rank + 1)]
        for param in own:
            param.grad = torch.randn(3, generator=generator)
        optimizer = sg.optim.SGD(
            [{"params": [shared]}, {"params": own}],
            lr=1.0,
            max_norm=0.5,
            norm_type=p,
            clip_scope=scope,
            reduce_norm=[None, dist.group.WORLD],
        )
        optimizer = copy.deepcopy(optimizer)
        params = [q for group in optimizer.param_groups for q in group["params"]]
        before = locals_of(params)
        with CommDebugMode() as mode:
            for new, old in zip(params, [shared, *own], strict=True):
                new.grad = old.grad
            optimizer.step()
        found[f"{scope} {p:g}"] = {
            "grads": [q.grad.clone() for q in params],
            "moved": [a - b for a, b in zip(before, locals_of(params), strict=True)],
            "norm": float(optimizer.grad_norm),
            "collectives": mode.get_total_counts(),
        }
        if rank == world - 1:
            own[0].grad[0] = torch.nan
        before = locals_of(params)
        optimizer.step()
        found[f"{scope} {p:g}"]["skipped"] = optimizer.skipped_steps
        found[f"{scope} {p:g}"]["unchanged"] = all(map(torch.equal, before, locals_of(params)))
    return found


def stages_of_shards(rank: int, world: int, meshes: Meshes) -> Found:
    """Step a pipeline of sharded stages: one collective over the stage's mesh, one over the pipeline's ranks."""
    if world != 4:
        return {}
    mesh = meshes.square  # its dimension dp is the pipeline here
    generator = torch.Generator().manual_seed(30 + mesh.get_local_rank("dp"))
    param = nn.Parameter(
        distribute_tensor(torch.randn(5, 2, generator=generator), mesh["tp"], [Shard(0)])
    )
    grad = torch.randn(5, 2, generator=generator)
    optimizer = sg.optim.SGD([param], lr=1.0, max_norm=0.5, reduce_norm=mesh["dp"])
    param.grad = distribute_tensor(grad, mesh["tp"], [Shard(0)])
    with CommDebugMode() as mode:
        optimizer.step()
    found = {
        "grad": grad,
        "norm": float(optimizer.grad_norm),
        "collectives": mode.get_total_counts(),
    }
    if rank == 3:
        local(param.grad).view(-1)[0] = torch.inf
    optimizer.step()
    return {**found, "skipped": optimizer.skipped_steps}


def experts_of_stages(rank: int, world: int, meshes: Meshes) -> Found:
    """Give each of the two ranks of a stage experts of its own, so that one group is inside the other."""
    if world != 4:
        return {}
    mesh = meshes.square  # its dimension dp is the pipeline here
    found: Found = {}
    for scope, p in (("global", 2.0), ("group", 2.0), ("global", 3.0), ("group", torch.inf)):
        for reverse in (False, True):
            params = []
            for seed in (50 + mesh.get_local_rank("dp"), 60 + rank):
                generator = torch.Generator().manual_seed(seed)
                param = nn.Parameter(torch.zeros(5))
                param.grad = torch.randn(5, generator=generator)
                params.append(param)
            groups = [({"params": params[:1]}, mesh["dp"]), ({"params": params[1:]}, meshes.flat)]
            if reverse:
                groups.reverse()
            optimizer = sg.optim.SGD(
                [group for group, _ in groups],
                lr=1.0,
                max_norm=0.5,
                norm_type=p,
                clip_scope=scope,
                reduce_norm=[over for _, over in groups],
            )
            optimizer.step()
            found[f"{scope} {p:g} {reverse}"] = {
                "grads": [param.grad for param in params],
                "moved": [-param.detach() for param in params],
                "norm": float(optimizer.grad_norm),
            }
    return found


def meshes_beside_each_other(rank: int, world: int, meshes: Meshes) -> Found:
    """Use two meshes without a common rank in one model: all ranks hold all DTensors, some without elements."""
    if world != 4:
        return {}
    rows = [meshes.row(0), meshes.row(1)]
    generator = torch.Generator().manual_seed(40)
    params, grads = [], []
    for mesh in rows:
        value, grad = (torch.randn(5, 2, generator=generator) for _ in range(2))
        param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None))
        if mesh.get_coordinate() is not None:
            param.grad = distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None)
        params.append(param)
        grads.append(grad)
    optimizer = sg.optim.AdamW(params, lr=0.1, max_norm=0.5)
    optimizer.step()
    norm = float(optimizer.grad_norm)
    if rank == 2:
        local(params[1].grad).view(-1)[0] = torch.nan
    optimizer.step()
    return {"grads": grads, "norm": norm, "skipped": optimizer.skipped_steps}


def meshes_that_overlap(rank: int, world: int, meshes: Meshes) -> Found:
    """Use overlapping meshes on three of four ranks; the rank on both is in more groups than the others."""
    if world < 4:
        return {}
    both = [DeviceMesh("cpu", torch.tensor(ranks)) for ranks in ([0, 1], [1, 2])]
    if rank == 3:
        return {}
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])) for mesh in both]
    for param, mesh in zip(params, both, strict=True):
        param.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    optimizer = sg.optim.SGD(params, lr=1.0, max_norm=2.0)
    optimizer.step()
    return {"norm": float(optimizer.grad_norm), "weights": locals_of(params)}


def clips_of_empty_parts(rank: int, world: int, meshes: Meshes) -> Found:
    """Clip one row that the first rank holds; a second group on the same rank is not clipped."""
    found: Found = {}
    for scope in ("global", "group", "tensor"):
        params = [
            nn.Parameter(distribute_tensor(torch.ones(1, 2), meshes.flat, [Shard(0)]))
            for _ in range(2)
        ]
        for param in params:
            param.grad = distribute_tensor(torch.ones(1, 2), meshes.flat, [Shard(0)])
        groups = [{"params": params[:1]}, {"params": params[1:], "max_norm": None}]
        optimizer = sg.optim.SGD(groups, lr=1.0, max_norm=0.1, clip_scope=scope)
        optimizer.step()
        clipped = optimizer.clipped_steps
        if rank > 0 and scope != "tensor":  # the case that this rank has no gradient at all
            params[0].grad = None
        optimizer.step()
        found[scope] = [clipped, optimizer.clipped_steps]
    return found


def norms_of_ranks(rank: int, world: int, meshes: Meshes) -> Found:
    reduce_norm = sg.distributed.reduce_norm
    found: Found = {f"{p:g}": reduce_norm(float(rank), None, p) for p in (1.0, 2.0, 3.0, torch.inf)}
    found["float32"] = reduce_norm(torch.tensor(3e38), meshes.flat)
    found["huge"] = reduce_norm(1e300, dist.group.WORLD, 7.0)
    found["tiny"] = reduce_norm(1e-300, dist.group.WORLD, 7.0)
    found["zero"] = reduce_norm(0.0, dist.group.WORLD, 3.0)
    found["nan"] = reduce_norm(torch.nan if rank == 1 else 1.0)
    found["infinite"] = reduce_norm(torch.inf if rank == 1 else 1.0, norm_type=3.0)
    found["refused"] = [
        message(lambda: reduce_norm(1.0, "pp")),
        message(lambda: reduce_norm(1.0, None, 0)),
        message(lambda: reduce_norm(torch.ones(2))),
    ]
    return found


def checkpoint_into_torch(rank: int, world: int, meshes: Meshes) -> Found:
    """Load a state dict of ours into torch's optimizer, and torch's into ours."""
    trained = TensorTraining(meshes, world)
    other = TensorTraining(meshes, world)
    ours = sg.optim.AdamW(trained.groups, lr=0.1)
    trained.backward(0)
    ours.step()
    for there, here in zip(other.params, trained.params, strict=True):
        local(there.data).copy_(local(here.data))
    torchs = torch.optim.AdamW(other.groups, lr=0.1, foreach=False)
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for step in (2, 4):
        for training, optimizer in ((trained, ours), (other, torchs)):
            training.backward(step)
            optimizer.step()
        if step == 2:
            ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    return {
        "ours": [whole(p) for p in trained.params],
        "torch": [whole(p) for p in other.params],
        "path": ours.path,
    }


def exchanged_shards(rank: int, world: int, meshes: Meshes) -> Found:
    """Exchange a DTensor's memory behind it, as fully_shard does when a model is moved."""
    param = nn.Parameter(distribute_tensor(torch.ones(4, 2), meshes.flat, [Shard(0)]))
    optimizer = sg.optim.SGD([param], lr=1.0)
    param.grad = distribute_tensor(torch.ones(4, 2), meshes.flat, [Shard(0)])
    optimizer.step()
    old = param._local_tensor
    param._local_tensor = torch.full_like(old, 5.0)
    optimizer.step()
    fresh = nn.Parameter(distribute_tensor(torch.ones(4, 2), meshes.flat, [Replicate()]))
    fresh.grad = distribute_tensor(torch.ones(4, 2), meshes.flat, [Replicate()])
    optimizer.param_groups[0]["params"] = [fresh]
    optimizer.step()
    return {
        "old": old,
        "new": param._local_tensor.clone(),
        "fresh": whole(fresh),
        "norm": float(optimizer.grad_norm),
    }


def data_parallel(rank: int, world: int, meshes: Meshes) -> Found:
    torch.manual_seed(3)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
    optimizer = sg.optim.SGD(model.parameters(), lr=0.1, max_norm=0.01)
    generator = torch.Generator().manual_seed(rank)
    model(torch.randn(3, 4, generator=generator)).pow(2).sum().backward()
    with CommDebugMode() as mode:
        optimizer.step()
    return {
        "norm": float(optimizer.grad_norm),
        "weight": model.module.weight.detach(),
        "in step": mode.get_total_counts(),
    }


SITUATIONS = (
    nan_on_one_rank,
    infinity_found_on_one_rank,
    ranks_without_gradients,
    functions,
    options_of_a_step,
    pipeline_and_experts,
    stages_of_shards,
    experts_of_stages,
    meshes_beside_each_other,
    meshes_that_overlap,
    clips_of_empty_parts,
    norms_of_ranks,
    checkpoint_into_torch,
    exchanged_shards,
    data_parallel,
)
