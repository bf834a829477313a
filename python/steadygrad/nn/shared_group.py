"""How a module holds its process group: copies share it, and the default group is saved as what it is."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SharedGroup:
    """A process group that a module can be copied and, where it is the default group, pickled with.

    The default group is not held: it is whatever ``init_process_group`` has made by the time it is asked for.

    Args:
        group: None for the default group.
    """

    __slots__ = ("_group",)

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group

    @classmethod
    def of(cls, group: ProcessGroup | None) -> SharedGroup | None:
        """Returns what a module is to hold for `group`, which is None for no group at all."""
        if group is None:
            return None
        return cls(None if group is _default_group() else group)

    def group(self) -> ProcessGroup | None:
        """Returns the group; None where it is the default one and ``torch.distributed`` is not initialized."""
        return _default_group() if self._group is None else self._group

    @property
    def held(self) -> ProcessGroup | None:
        """What ``torch.nn.SyncBatchNorm`` holds for the same group: None for the default one."""
        return self._group

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[Callable[..., SharedGroup], tuple[None]]:
        if self._group is None:
            return SharedGroup, (None,)
        raise pickle.PicklingError(
            "batch norm: process_group: expected None or the default group in a module that is saved whole, got "
            "another group, which is a connection between running processes: save model.state_dict() instead, or set "
            "process_group to None in every batch norm first and anew after loading"
        )


def _default_group() -> ProcessGroup | None:
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return None
