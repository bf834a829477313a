"""Parameters that are parts of a whole though no DTensor says so: those of ``ZeroRedundancyOptimizer`` and of FSDP1."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


def zero_redundancy_optimizer() -> Any | None:
    """The ``ZeroRedundancyOptimizer`` that is making its local optimizer further up this call stack, or None.

    It gives each rank other parameters and tells the local optimizer nothing of it, so only the stack knows.
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
    """The place of the first parameter that ``FullyShardedDataParallel`` has split; None without one."""
    # FSDP1 cannot have been at work where it was never imported or where there is one rank.
    if "torch.distributed.fsdp" not in sys.modules or not dist.is_initialized():
        return None
    if dist.get_world_size() == 1:
        return None
    return next((i for i, param in enumerate(params) if _is_marked(param)), None)


def _is_marked(param: Tensor) -> bool:
    # The first mark is that of a flat parameter, the second that of a view of one (use_orig_params=True).
    return bool(getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False))


def check_parts(
    param_groups: Sequence[dict[str, Any]],
    reduce_norm: Any,
    clips_parameters: bool,
) -> None:
    """Refuses parameters of FSDP1 whose norm over all ranks a step would not take.

    A list in ``reduce_norm`` is the user's word on each param group, also where it says None.

    Args:
        param_groups: of the optimizer.
        reduce_norm: the option.
        clips_parameters: whether a limit holds for each parameter, or each unit of it, by itself.

    Raises:
        ValueError: there is such a parameter.
    """
    is_list = isinstance(reduce_norm, (list, tuple))
    for number, group in enumerate(param_groups):
        place = part_of_fsdp1(group["params"])
        if place is None or (is_list and reduce_norm[number : number + 1] == [None]):
            continue
        where = f"step: param_groups[{number}]['params'][{place}]"
        if reduce_norm is None:
            raise ValueError(
                f"{where}: expected reduce_norm=model.process_group with parameters of FullyShardedDataParallel, of "
                "which each rank holds a part, got reduce_norm=None: every rank would clip by the norm of its own "
                "part. Under ShardingStrategy.NO_SHARD write reduce_norm=[None], with a None for each param group"
            )
        if clips_parameters:
            raise ValueError(
                f"{where}: expected clip_scope='global' or 'group', and no ClipAdaptive, with parameters of "
                "FullyShardedDataParallel, of which each rank holds a part, got a limit for each parameter by itself; "
                "fully_shard (FSDP2) has no such restriction"
            )
