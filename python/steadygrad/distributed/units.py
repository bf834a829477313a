"""Checks that this process holds whole output units of sharded parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steadygrad import _kernels
from steadygrad.distributed.dtensors import dtensor_type


def check_whole_units(param_groups: Sequence[dict[str, Any]], default: float) -> None:
    """Refuses DTensors whose shards cut through units that :class:`steadygrad.ClipAdaptive` has to clip.

    Args:
        param_groups: The param groups of the optimizer.
        default: The ``clipping`` of param groups without that key.

    Raises:
        ValueError: There is such a parameter; the message has its place, and its name if the param group has names.
    """
    place = 0
    for number, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            if group.get(_kernels.CLIPPING, default) is not None and not _holds_whole_units(param):
                names = group.get("param_names")
                name = "" if names is None else f" ({names[i]!r})"
                raise ValueError(
                    f"step: clip: ClipAdaptive: parameters[{place}]{name}: expected every rank to hold whole units, "
                    "Shard(0) of two or more dimensions, or replicas, got a DTensor of shape "
                    f"{tuple(param.shape)} with placements {param.placements}. Put it into a param group with "
                    f"{_kernels.CLIPPING}=None (it is in param_groups[{number}]), which leaves it out"
                )
            place += 1


def _holds_whole_units(param: Tensor) -> bool:
    kind = dtensor_type()
    if kind is None or type(param) is not kind:
        return True
    mesh = param.device_mesh  # type: ignore[attr-defined]
    return all(
        placement.is_replicate()
        or mesh.size(dimension) == 1
        or (param.ndim >= 2 and placement.is_shard(0))
        for dimension, placement in enumerate(param.placements)  # type: ignore[attr-defined]
    )
