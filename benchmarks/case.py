"""What a race has to know of a case, whatever it measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from benchmarks.timer import Candidate

# Makes a candidate over fresh buffers of its own on a device.
Build = Callable[[torch.device], Candidate]


class Case(Protocol):
    """One operation on one set of shapes: the candidates, and how many bytes have to move."""

    @property
    def group(self) -> str:
        """Short name of the operation, first half of the key."""

    @property
    def key(self) -> str:
        """Name of the case, unique in the table: group/shapes."""

    @property
    def title(self) -> str:
        """Name of the operation, for people: a heading that the cases of a group share."""

    @property
    def floor(self) -> str:
        """What the cases of the group have to move, for people."""

    @property
    def subject(self) -> str:
        """What the operation is measured on, for people."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements that are counted."""

    @property
    def tensors(self) -> int:
        """Tensors that one call works on."""

    @property
    def elements(self) -> int:
        """Elements that the bytes per element refer to."""

    @property
    def bytes_per_element(self) -> float:
        """The floor: bytes that our path has to move per element, with no help from caches."""

    @property
    def floor_bytes(self) -> int:
        """Bytes that our path has to move in one call."""

    @property
    def working_set_bytes(self) -> int:
        """Bytes that one call of ours touches."""

    @property
    def quick(self) -> bool:
        """Whether it is part of the quick table."""

    @property
    def host_cost(self) -> bool:
        """Whether data fits in cache and the time is that of the calls: reported per tensor."""

    @property
    def allocates(self) -> bool:
        """Whether a call allocates its results, in memory that another candidate has just freed."""

    @property
    def averaged(self) -> bool:
        """Whether the cases of the group are of one kind, so that their geometric mean says something."""

    @property
    def clock(self) -> str:
        """The clock that counts on a GPU, "device" or "wall"."""

    @property
    def builds(self) -> tuple[Build, ...]:
        """Ours first, then the peers."""

    def memory_needed(self, buffer_sets: int = 1) -> int:
        """Bytes to have free for all candidates, each with so many sets of buffers."""

    def cut(self) -> Case:
        """The same on a few thousand elements, for a rehearsal; cases of one kind may become one."""
