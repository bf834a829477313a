"""Finds out which ranks hold which parts of a list of tensors, and which of them counts a part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from steadygrad.distributed.agreement import agreed_meshes
from steadygrad.distributed.dtensors import dtensor_type
from steadygrad.distributed.groups import check_initialized, group_over, ranks_of


class Layout:
    """Says which parts of some tensors this rank counts in sums over all ranks.

    A DTensor is counted by the ranks at coordinate 0 of every mesh dimension that replicates it; the mesh is the one on
    which the first rank sees the DTensor. Any other tensor is taken as a replica, which the first rank counts.

    Attributes:
        counted: For each tensor, whether this rank counts the part that it holds.
        group: The process group over all ranks of all the meshes; None if there is nothing to add up.
    """

    def __init__(
        self,
        function: str,
        groups: Sequence[Sequence[Tensor]],
        anew: bool,
        settings: Sequence[str] = (),
    ) -> None:
        self._key, self._kept = _key_of(groups)
        self._meshes: list[Any] = []
        self._places: dict[tuple[int, Any], tuple[int, str, bool]] = {}
        kind = dtensor_type()
        found: list[tuple[int, bool]] = []
        lines: list[str] = []
        for number, group in enumerate(groups):
            for tensor in group:
                if type(tensor) is not kind:
                    found.append((-1, True))
                    lines.append(f"a tensor of group {number}")
                    continue
                mesh, line, counts = self._place(function, tensor)
                found.append((mesh, counts))
                lines.append(f"a {tuple(tensor.shape)} DTensor of group {number} {line}")
        self.counted = [counts for _, counts in found]
        self.group: dist.ProcessGroup | None = None
        mesh_ranks = [ranks_of(mesh) for mesh in self._meshes]
        ranks = tuple(sorted(set().union(*mesh_ranks)))
        # A single rank has nobody to ask. Ranks outside the meshes hold no part of the tensors.
        if len(ranks) < 2:
            return
        check_initialized(f"{function}: parameters")
        if dist.get_rank() not in ranks:
            return
        own = [list(r) for r in mesh_ranks]
        first = agreed_meshes(function, ranks, own, lines, list(settings), anew)
        rank = dist.get_rank()
        here = [rank in mesh for mesh in first]
        self.counted = [
            counts and (here[mesh] if mesh >= 0 else rank == ranks[0]) for mesh, counts in found
        ]
        self.group = group_over(ranks, self._meshes)

    def is_of(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """Returns whether the layout was made from tensors with the very same ``DTensorSpec`` objects."""
        return self._key == _key_of(groups)[0]

    def _place(self, function: str, tensor: Any) -> tuple[int, str, bool]:
        """Returns the number of the tensor's mesh, a line on its placements, and whether this rank counts it."""
        mesh, placements = tensor.device_mesh, tensor.placements
        place = self._places.get((id(mesh), placements))
        if place is not None:
            return place
        if any(placement.is_partial() for placement in placements):
            raise TypeError(
                f"{function}: parameters: expected DTensors that are sharded or replicated, got placements {placements}"
            )
        if mesh not in self._meshes:
            self._meshes.append(mesh)
        number = self._meshes.index(mesh)
        here = mesh.get_coordinate()
        counts = here is not None and all(
            coordinate == 0 or not placement.is_replicate()
            for coordinate, placement in zip(here, placements, strict=True)
        )
        line = f"on mesh {number} of shape {tuple(mesh.shape)}, {placements}"
        self._places[id(mesh), placements] = place = (number, line, counts)
        return place


def _key_of(groups: Sequence[Sequence[Tensor]]) -> tuple[tuple[int, ...], list[Any]]:
    """Returns a key made from the ids of the tensors' layouts, and the objects, which have to live as long as it."""
    kept: list[Any] = [getattr(tensor, "_spec", None) for group in groups for tensor in group]
    kept.append(dist.group.WORLD)
    return (*map(len, groups), *map(id, kept)), kept


_layouts: OrderedDict[tuple[int, ...], Layout] = OrderedDict()
_KEPT = 16


def layout_of(function: str, tensors: Sequence[Tensor]) -> Layout:
    """Returns the layout of a function's tensors; at the first call all ranks of their meshes have to call it.

    Raises:
        TypeError: A DTensor is a partial sum.
        RuntimeError: Another rank holds other tensors, or did not come.
    """
    key = _key_of([tensors])[0]
    layout = _layouts.get(key)
    if layout is None:
        # Gradients may have new layout objects at every call, so ranks that agreed on equal contents do not ask again.
        layout = _layouts[key] = Layout(function, [tensors], anew=False)
        if len(_layouts) > _KEPT:
            _layouts.popitem(last=False)
    _layouts.move_to_end(key)
    return layout
