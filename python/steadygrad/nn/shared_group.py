"""Holds a module's process group: copies share it, and the default group can be pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SharedGroup:
    """Holds a process group in a module that can be copied and, with the default group, pickled.

    The default group is not stored; it is always the one that ``init_process_group`` has made last.

    Args:
        group: The process group; None for the default group.
    """

    __slots__ = ("_group",)

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group

    @classmethod
    def of(cls, group: ProcessGroup | None) -> SharedGroup | None:
        """Returns the object that a module holds for `group`; None if there is no group."""
        if group is None:
            return None
        return cls(None if group is _default_group() else group)

    def group(self) -> ProcessGroup | None:
        """Returns the group, or None if it is the default one and ``torch.distributed`` is not initialized."""
        return _default_group() if self._group is None else self._group

    @property
    def held(self) -> ProcessGroup | None:
        """Returns what ``torch.nn.SyncBatchNorm`` stores for the same group: None for the default one."""
        return self._group

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[Callable[..., SharedGroup], tuple[None]]:
        if self._group is None:
            return SharedGroup, (None,)
        raise pickle.PicklingError(
            "batch norm: process_group: expected None or the default group in a module that is pickled, got another "
            "group, which is a connection between running processes: save model.state_dict() instead, or set "
            "process_group to None in every batch norm before saving and set it again after loading"
        )


def _default_group() -> ProcessGroup | None:
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return None
