"""The step that ``torch.distributed.checkpoint`` takes only so that an optimizer has state to load into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadygrad.arguments import as_float
from steadygrad.distributed.dtensors import local_tensor
from steadygrad.memory import is_number_on


def is_state_creation(
    param_groups: list[dict[str, Any]],
    defaults: dict[str, Any],
    asynchronous_device: torch.device | None,
    told: bool,
) -> bool:
    """Whether a step without state has zero gradients and no learning rate.

    Args:
        param_groups: of the optimizer.
        defaults: of limits that a group lacks.
        asynchronous_device: where decisions are taken, or None.
        told: whether writers are told of each step.
    """
    for group in param_groups:
        rate = group.get("lr", 1)
        if is_number_on(rate, asynchronous_device):
            return False
        if not isinstance(rate, (int, float, Tensor)) or float(rate) != 0:
            return False
    # On a device to look at the gradients is to wait for them: only where a penalty, a clip to nothing or writers would
    # leave traces. Without writers the ring has a row for it.
    waits = asynchronous_device is not None
    leaves_traces = told or any(_leaves_traces({**defaults, **group}) for group in param_groups)
    if waits and not leaves_traces:
        return False
    grads = [
        local_tensor(param.grad)
        for group in param_groups
        for param in group["params"]
        if param.grad is not None
    ]
    return all(not grad.is_sparse and _has_memory(grad) and not bool(grad.any()) for grad in grads)


def _leaves_traces(group: dict[str, Any]) -> bool:
    limit = as_float(group["max_norm"])
    clips_to_nothing = isinstance(limit, (int, float)) and limit < 1e-6
    return bool(group["l1"] or group["l2"] or clips_to_nothing)


def _has_memory(tensor: Tensor) -> bool:
    """Whether torch may read it: one whose storage was freed would crash it, and the step says so in words."""
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0
