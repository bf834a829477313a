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
    """One operation on one set of shapes: the candidates, and how many bytes have to move.

    Attributes:
        group: short name of the operation, first half of the key.
        key: name of the case, unique in a plan: group/shapes.
        title: name of the operation, for people; the cases of a group share it.
        subject: what it is measured on, for people.
        dtype: of the elements that are counted.
        tensors: how many one call works on.
        elements: what the bytes per element refer to.
        bytes_per_element: bytes that our path has to move per element, with no help from caches.
        working_set_bytes: bytes that one call of ours touches.
        set_bytes: memory of all candidates' buffers, one set each.
        spare_bytes: memory for what calls allocate.
        builds: ours first, then the peers.
        cut: makes the same on a few thousand elements, for a rehearsal; cases of one kind may become one.
        quick: part of the quick table.
        host_cost: data fits in cache and the time is that of the calls, so it is reported per tensor.
        allocates: a call allocates its results, in memory that another candidate has just freed.
        averaged: the cases of the group are of one kind, so that their geometric mean says something.
        clock: the one that counts on a GPU, "device" or "wall".
    """

    group: str
    key: str
    title: str
    subject: str
    dtype: torch.dtype
    tensors: int
    elements: int
    bytes_per_element: float
    working_set_bytes: int
    set_bytes: int
    spare_bytes: int
    builds: tuple[Build, ...]
    cut: Callable[[], Case]
    quick: bool = False
    host_cost: bool = False
    allocates: bool = False
    averaged: bool = False
    clock: str = "device"

    @property
    def floor_bytes(self) -> int:
        """Bytes that our path has to move in one call."""
        return round(self.bytes_per_element * self.elements)

    def memory_needed(self, buffer_sets: int = 1) -> int:
        """Return the bytes to have free for all candidates, each with so many sets of buffers."""
        return buffer_sets * self.set_bytes + self.spare_bytes
