"""Finds parameters that are parts of a whole without being DTensors, as ``ZeroRedundancyOptimizer`` and FSDP1 make."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


def zero_redundancy_optimizer() -> Any | None:
    """Returns the ``ZeroRedundancyOptimizer`` that is making its local optimizer up this call stack, or None.

    It gives each rank different parameters and does not tell the local optimizer, so only the call stack knows.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        maker = frame.f_locals.get("self")
        if isinstance(maker, module.ZeroRedundancyOptimizer):
            return maker
        frame = frame.f_back  # type: ignore[assignment]
    return None


def part_of_fsdp1(params: Sequence[Tensor]) -> int | None:
    """Returns the index of the first parameter that ``FullyShardedDataParallel`` has split, or None."""
    # FSDP1 has split nothing if it was never imported or if there is only one rank.
    if "torch.distributed.fsdp" not in sys.modules or not dist.is_initialized():
        return None
    if dist.get_world_size() == 1:
        return None
    return next((i for i, param in enumerate(params) if _is_marked(param)), None)


def _is_marked(param: Tensor) -> bool:
    # The first attribute marks a flat parameter, the second a view of one (use_orig_params=True).
    return bool(getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False))


def check_parts(
    param_groups: Sequence[dict[str, Any]],
    reduce_norm: Any,
    clips_parameters: bool,
) -> None:
    """Refuses parameters of FSDP1 if the step would not compute their norm over all ranks.

    A list in ``reduce_norm`` decides for each param group, also where its entry is None.

    Args:
        param_groups: The param groups of the optimizer.
        reduce_norm: The option of that name.
        clips_parameters: Whether each parameter, or each unit of it, has a limit of its own.

    Raises:
        ValueError: There is such a parameter.
    """
    is_list = isinstance(reduce_norm, (list, tuple))
    for number, group in enumerate(param_groups):
        place = part_of_fsdp1(group["params"])
        if place is None or (is_list and reduce_norm[number : number + 1] == [None]):
            continue
        where = f"step: param_groups[{number}]['params'][{place}]"
        if reduce_norm is None:
            raise ValueError(
                f"{where}: expected reduce_norm=model.process_group, since FullyShardedDataParallel has split the "
                "parameter over the ranks, got reduce_norm=None: every rank would clip by the norm of its own part "
                "alone. Under ShardingStrategy.NO_SHARD write reduce_norm=[None], with a None for each param group"
            )
        if clips_parameters:
            raise ValueError(
                f"{where}: expected clip_scope='global' or 'group', and no ClipAdaptive, since "
                "FullyShardedDataParallel has split the parameter over the ranks, got a limit for each single "
                "parameter or unit; fully_shard (FSDP2) has no such restriction"
            )
