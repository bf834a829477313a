"""Declare what a race needs to know about a case of any kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timer import Candidate

# A function that builds a candidate with fresh buffers on a device.
Build = Callable[[torch.device], Candidate]

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """Describes one operation on one set of shapes: its candidates, and the bytes it has to move."""

    group: str  # short name of the operation
    key: str  # group/shapes, unique in a plan
    title: str  # name of the operation, for people
    subject: str  # name of the shapes, for people
    dtype: torch.dtype
    tensors: int  # number of tensors in one call
    elements: int  # number of elements in one call
    bytes_per_element: float  # what our path has to move without caches
    working_set_bytes: int  # bytes that one call of ours touches
    set_bytes: int  # bytes of one set of buffers for every candidate
    spare_bytes: int  # bytes for what calls allocate
    builds: tuple[Build, ...]  # ours first, then the peers
    cut: Callable[[], Case]  # makes the same case on a few thousand elements, to rehearse
    quick: bool = False  # whether it is part of the quick table
    host_cost: bool = False  # data fits in cache; times are those of calls, per tensor
    allocates: bool = False  # results go to memory that another candidate has just freed
    averaged: bool = False  # cases of the group are alike, so their mean makes sense
    clock: str = "device"  # clock that counts on a GPU, "device" or "wall"

    @property
    def floor_bytes(self) -> int:
        """Return the bytes that our path has to move in one call."""
        return round(self.bytes_per_element * self.elements)

    def memory_needed(self, buffer_sets: int = 1) -> int:
        """Return the bytes of memory needed if every candidate has `buffer_sets` sets of buffers."""
        return buffer_sets * self.set_bytes + self.spare_bytes
