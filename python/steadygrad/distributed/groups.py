"""The process groups that sums are taken over."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist

# Groups over the ranks of a mesh of several dimensions, for which torch makes none.
_made: dict[tuple[int, ...], dist.ProcessGroup] = {}
# How often they have been made under a store.
_turns: dict[tuple[int, ...], tuple[Any, int]] = {}


def check_process_group(where: str, process_group: Any) -> None:
    """Refuses what collectives cannot run over on this rank; ``where`` starts the messages.

    Raises:
        TypeError: it is not a ``torch.distributed.ProcessGroup``.
        RuntimeError: it was destroyed or never initialised, or this rank is not a member.
    """
    if not dist.is_available():
        raise RuntimeError(f"{where}: this torch was built without torch.distributed")
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(f"{where}: expected a group that this rank is a member of")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"{where}: expected a torch.distributed.ProcessGroup, got {type(process_group).__name__}"
        )
    if not is_alive(process_group):
        raise RuntimeError(
            f"{where}: expected an initialized group, got one that was destroyed "
            "or belongs to an earlier init_process_group"
        )


def check_initialized(where: str) -> None:
    """Refuses where there are no other ranks to speak to.

    Raises:
        RuntimeError: torch has no distributed package, or ``init_process_group`` was not called or was undone.
    """
    if not dist.is_available():
        raise RuntimeError(f"{where}: this torch was built without torch.distributed")
    if not dist.is_initialized():
        raise RuntimeError(
            f"{where}: expected an initialized group, got none: call init_process_group() first, and make meshes "
            "anew after it was destroyed"
        )


def is_alive(process_group: dist.ProcessGroup) -> bool:
    """Whether collectives can still run over it."""
    try:
        if dist.is_initialized():
            dist.get_backend(process_group)
            return True
    except ValueError:
        pass
    return False


def as_process_group(where: str, group: Any) -> dist.ProcessGroup:
    """A process group, or that of a device mesh of one dimension.

    Raises:
        TypeError: it is neither.
        ValueError: the mesh has several dimensions.
        RuntimeError: the group was destroyed, or this rank is not a member.
    """
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise ValueError(
                f"{where}: expected a process group or a device mesh of one dimension, such as mesh['pp'], "
                f"got one of {group.ndim}"
            )
        group = group.get_group()
    check_process_group(where, group)
    process_group: dist.ProcessGroup = group
    return process_group


def group_over(ranks: tuple[int, ...], meshes: list[Any]) -> dist.ProcessGroup | None:
    """A group of exactly these ranks; all of them have to come. None for a rank that is not among them.

    Where neither a mesh nor the world has one, it is made, once: only its members take part in that, and they
    have just agreed on it.
    """
    if dist.get_rank() not in ranks:
        return None
    for mesh in meshes:
        if mesh.ndim == 1 and ranks_of(mesh) == ranks:
            group: dist.ProcessGroup = mesh.get_group()
            return group
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    made = _made.get(ranks)
    if made is None or not is_alive(made):
        made = _made[ranks] = _new_group(ranks)
    return made


def _new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """Among its members alone, under a name that all of them know.

    torch would name it by how many groups a rank has made or is in. Where these numbers differ, members wait for each
    other under different names; and a count that only some have raised parts the names of groups made later.
    """
    module: Any = dist.distributed_c10d
    store = module._get_default_store()
    known_store, turn = _turns.get(ranks, (None, 0))
    turn = turn + 1 if known_store is store else 0
    _turns[ranks] = store, turn
    name = hashlib.sha256(f"steadygrad {ranks} {turn}".encode()).hexdigest()
    named_by_torch, groups_made = module._hash_ranks_to_str, module._world.group_count
    module._hash_ranks_to_str = lambda ranks: name
    try:
        made: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    finally:
        module._hash_ranks_to_str = named_by_torch
        module._world.group_count = groups_made
    return made


def ranks_of(mesh: Any) -> tuple[int, ...]:
    """The ranks of a device mesh, ascending."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))
