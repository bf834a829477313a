"""One rank that saves checkpoints, or resumes from those that other numbers of ranks have saved."""

from __future__ import annotations

import copy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.distributed.checkpoint_cases import (
    AFTER,
    BEFORE,
    CASES,
    FULL_CASES,
    OLD_CASES,
    OLD_KEYS,
    OLD_STATE,
    TORCH_CASES,
    Case,
    contents,
    network,
    train,
)
from tests.ranks import leave_ranks

Found = dict[str, Any]
Optimizer = torch.optim.Optimizer


def shared(case: Case, mesh: DeviceMesh | None, seed: int) -> nn.Module:
    made = network(case, seed)
    if mesh is not None:
        for module in (made.up, made.down, made):
            fully_shard(module, mesh=mesh)
    return made


def options_for(case: Case) -> StateDictOptions:
    """Return the options of the state dicts, which are flat for half of the cases."""
    return StateDictOptions(flatten_optimizer_state_dict=case.rule == "SGD")


def state_dicts(case: Case, net: nn.Module, optimizer: Optimizer) -> Found:
    return {
        "model": get_model_state_dict(net),
        "optim": get_optimizer_state_dict(net, optimizer, options=options_for(case)),
    }


def without_new_keys(tree: Any) -> Any:
    """Return the state as it was saved before some options existed."""
    if not isinstance(tree, (dict, list)):
        return tree
    if isinstance(tree, list):
        return [without_new_keys(value) for value in tree]
    return {
        key: without_new_keys(value)
        for key, value in tree.items()
        if str(key).rsplit(".", 1)[-1] not in (*OLD_KEYS, *OLD_STATE)
    }


def save(folder: Path, mesh: DeviceMesh) -> Found:
    found: Found = {"saved": {}, "uninterrupted": {}}
    saved, old, full = {}, {}, {}
    trained = {}
    for case in (*CASES, *TORCH_CASES):
        net = shared(case, mesh, seed=1)
        optimizer = case.optimizer(net)
        train(net, optimizer, range(BEFORE))
        trained[case] = net, optimizer
        saved[str(case)] = state_dicts(case, net, optimizer)
        if case in OLD_CASES:
            old[str(case)] = without_new_keys(saved[str(case)])
        if case in (*FULL_CASES, *TORCH_CASES):
            everything = StateDictOptions(full_state_dict=True, cpu_offload=True)
            full[str(case)] = {
                "model": get_model_state_dict(net, options=everything),
                "optim": get_optimizer_state_dict(net, optimizer, options=everything),
            }
        found["saved"][str(case)] = contents(net, optimizer)
    dcp.save(saved, checkpoint_id=folder / "shards")
    dcp.save(old, checkpoint_id=folder / "old")
    if dist.get_rank() == 0:
        torch.save(full, folder / "full")
    dist.barrier()
    for case, (net, optimizer) in trained.items():
        train(net, optimizer, range(BEFORE, BEFORE + AFTER))
        found["uninterrupted"][str(case)] = contents(net, optimizer)
    return found


def resumed(
    pairs: list[tuple[Case, Case]], checkpoint: Path, mesh: DeviceMesh | None, partial: bool = False
) -> Found:
    """Return pairs of what was saved and what the resumed optimizer holds."""
    made = {}
    for saved, case in pairs:
        net = shared(case, mesh, seed=2)
        made[saved] = net, case.optimizer(net, lr=3.0)
    target = {str(saved): state_dicts(saved, *made[saved]) for saved, _ in pairs}
    planner = DefaultLoadPlanner(allow_partial_load=partial)
    dcp.load(target, checkpoint_id=checkpoint, planner=planner, no_dist=mesh is None)
    found = {}
    for saved, _ in pairs:
        net, optimizer = made[saved]
        set_model_state_dict(net, target[str(saved)]["model"])
        optim = target[str(saved)]["optim"]
        set_optimizer_state_dict(net, optimizer, optim, options=options_for(saved))
        found[str(saved)] = gone_on(net, optimizer)
    return found


def gone_on(net: nn.Module, optimizer: Optimizer) -> Found:
    loaded = contents(net, optimizer)
    train(net, optimizer, range(BEFORE, BEFORE + AFTER))
    return {"loaded": loaded, "after": contents(net, optimizer)}


def resumed_from_full(
    file: Path, cases: list[tuple[Case, Case]], mesh: DeviceMesh | None, broadcast: bool
) -> Found:
    """Resume from whole tensors, as one process or rank 0 has saved them."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    reads = not broadcast or dist.get_rank() == 0
    dicts = torch.load(file) if reads else {}
    found = {}
    for saved, case in cases:
        net = shared(case, mesh, seed=2)
        optimizer = case.optimizer(net, lr=3.0)
        own = copy.deepcopy(dicts.get(str(saved), {"model": {}, "optim": {}}))
        set_model_state_dict(net, own["model"], options=options)
        set_optimizer_state_dict(net, optimizer, own["optim"], options=options)
        found[str(saved)] = gone_on(net, optimizer)
    return found


def into_torch(case: Case) -> Case:
    return Case(case.rule, "torch", case.dtype)


def into_ours(case: Case) -> Case:
    rounding = "nearest" if case.dtype == torch.float32 else "master"
    return Case(case.rule, "wrapper", case.dtype, rounding)


def resume(folder: Path, mesh: DeviceMesh | None) -> Found:
    same = [(case, case) for case in CASES]
    to_torch = [(case, into_torch(case)) for case in CASES]
    from_torch = [(case, into_ours(case)) for case in TORCH_CASES]
    old = [(case, case) for case in OLD_CASES]
    full = [(case, case) for case in FULL_CASES]
    found = {
        "same": resumed(same, folder / "shards", mesh),
        "to torch": resumed(to_torch, folder / "shards", mesh),
        "from torch": resumed(from_torch, folder / "shards", mesh, partial=True),
        "old": resumed(old, folder / "old", mesh, partial=True),
        "full": resumed_from_full(folder / "full", full, mesh, broadcast=False),
        "full from torch": resumed_from_full(folder / "full", from_torch, mesh, broadcast=False),
    }
    if mesh is not None:
        full_to_torch = [(case, into_torch(case)) for case in FULL_CASES]
        found["broadcast"] = resumed_from_full(folder / "full", full, mesh, broadcast=True)
        found["full to torch"] = resumed_from_full(folder / "full", full_to_torch, mesh, True)
        found["one process"] = resumed_from_full(folder / "one_process", full, mesh, False)
    return found


def main(rank: int, world: int, folder: Path, checkpoints: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    mesh = init_device_mesh("cpu", (world,))
    found = save(checkpoints, mesh) if world == 2 else {}
    found |= resume(checkpoints, mesh)
    leave_ranks(found, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
