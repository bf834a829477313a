"""The process groups over which sums are computed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist

# Groups over the ranks of a mesh of several dimensions; torch has none for such a mesh.
_made: dict[tuple[int, ...], dist.ProcessGroup] = {}
# The store and how often a group over these ranks was made under it.
_turns: dict[tuple[int, ...], tuple[Any, int]] = {}


def check_process_group(where: str, process_group: Any) -> None:
    """Refuses a group over which this rank cannot run collectives; messages start with ``where``.

    Raises:
        TypeError: The group is not a ``torch.distributed.ProcessGroup``.
        RuntimeError: The group was destroyed or never initialised, or this rank is not a member.
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
    """Refuses to go on if there are no other ranks to communicate with; messages start with ``where``.

    Raises:
        RuntimeError: torch has no distributed package, or ``init_process_group`` was not called or was undone.
    """
    if not dist.is_available():
        raise RuntimeError(f"{where}: this torch was built without torch.distributed")
    if not dist.is_initialized():
        raise RuntimeError(
            f"{where}: expected an initialized group, got none: call init_process_group() first, and make new meshes "
            "after the group was destroyed"
        )


def is_alive(process_group: dist.ProcessGroup) -> bool:
    """Returns whether collectives can still run over the group."""
    try:
        if dist.is_initialized():
            dist.get_backend(process_group)
            return True
    except ValueError:
        pass
    return False


def as_process_group(where: str, group: Any) -> dist.ProcessGroup:
    """Returns a process group unchanged, or the group of a device mesh of one dimension.

    Raises:
        TypeError: The argument is neither.
        ValueError: The mesh has several dimensions.
        RuntimeError: The group was destroyed, or this rank is not a member.
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
    """Returns a group of exactly these ranks, or None if this rank is not among them.

    If neither a mesh nor the world has such a group, it is made, once, and all of the ranks have to call this function.
    Only the members take part in that, and they have just agreed on it.
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
    """Makes a group among its members alone, under a name that all of them know.

    torch would derive the name from the number of groups that a rank has made or belongs to. If these numbers differ,
    the members wait for each other under different names. And if only some ranks raised their count, the names of
    groups made later would differ.
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
    """Returns the ranks of a device mesh, ascending."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))
