"""What a race has to know of a case, whatever it measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timer import Candidate

# Makes a candidate over fresh buffers of its own on a device.
Build = Callable[[torch.device], Candidate]

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """One operation on one set of shapes: the candidates, and how many bytes have to move."""

    group: str  # short name of the operation
    key: str  # group/shapes, unique in a plan
    title: str  # of the operation, for people
    subject: str  # what it is measured on, for people
    dtype: torch.dtype
    tensors: int  # that one call works on
    elements: int  # what the bytes per element refer to
    bytes_per_element: float  # that our path has to move, with no help from caches
    working_set_bytes: int  # that one call of ours touches
    set_bytes: int  # of all candidates' buffers, one set each
    spare_bytes: int  # for what calls allocate
    builds: tuple[Build, ...]  # ours first, then the peers
    cut: Callable[[], Case]  # makes the same on a few thousand elements, for a rehearsal
    quick: bool = False  # part of the quick table
    host_cost: bool = False  # data fits in cache; the time is that of the calls, told per tensor
    allocates: bool = False  # its results, in memory that another candidate has just freed
    averaged: bool = False  # the group is of one kind: its geometric mean says something
    clock: str = "device"  # the one that counts on a GPU, "device" or "wall"

    @property
    def floor_bytes(self) -> int:
        """Bytes that our path has to move in one call."""
        return round(self.bytes_per_element * self.elements)

    def memory_needed(self, buffer_sets: int = 1) -> int:
        """Return the bytes to have free for all candidates, each with so many sets of buffers."""
        return buffer_sets * self.set_bytes + self.spare_bytes
