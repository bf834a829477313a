"""The step that ``torch.distributed.checkpoint`` takes only so that an optimizer has state to load into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadygrad.distributed.dtensors import local_tensor
from steadygrad.memory import is_number_on


def is_state_creation(
    param_groups: list[dict[str, Any]],
    numbers: list[dict[str, float]],
    asynchronous_device: torch.device | None,
    told: bool,
) -> bool:
    """Whether a step without state has zero gradients and no learning rate.

    Args:
        param_groups: of the optimizer.
        numbers: those of the groups.
        asynchronous_device: where decisions are taken, or None.
        told: whether writers are told of each step.
    """
    if asynchronous_device is not None:
        # To look at the gradients is to wait for them: only where a penalty, a clip to nothing or
        # writers would leave traces. Without writers the ring has a row for it.
        leaves_traces = told or any(n["l1"] or n["l2"] or n["max_norm"] < 1e-6 for n in numbers)
        if not leaves_traces:
            return False
    for group in param_groups:
        rate = group.get("lr", 1)
        if is_number_on(rate, asynchronous_device):
            return False
        if not isinstance(rate, (int, float, Tensor)) or float(rate) != 0:
            return False
    grads = [
        local_tensor(param.grad)
        for group in param_groups
        for param in group["params"]
        if param.grad is not None
    ]
    return all(not grad.is_sparse and _has_memory(grad) and not bool(grad.any()) for grad in grads)


def _has_memory(tensor: Tensor) -> bool:
    """Whether torch may read it: one whose storage was freed would crash it, and the step says so in words."""
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0
