"""What the in-place path does around another optimizer's own step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steadygrad.memory import is_number_on
from steadygrad.optim.options import StabilizerOptions, checked_number
from steadygrad.penalty import soft_threshold_
from steadygrad.policies.adaptive import CLIPPING


def dense_grad(
    param: Tensor, group: dict[str, Any], options: StabilizerOptions, sums: dict[Tensor, Tensor]
) -> Tensor | None:
    """The gradient, or accumulated sum, as kernels take it; the values of a sparse one."""
    grad = sums.get(param, param.grad)
    if grad is None or not grad.is_sparse:
        return grad
    if options.clips_units(group):
        raise TypeError(
            "step: clip: ClipAdaptive: expected dense gradients, whose units are whole, got a sparse one of shape "
            f"{tuple(grad.shape)}. Put its parameter into a param group with {CLIPPING}=None, which leaves it out"
        )
    for key in ("l1", "l2"):
        if group.get(key, getattr(options, key)) != 0:
            raise ValueError(
                f"step: {key}: expected 0 where gradients are sparse (a penalty is dense), "
                f"got {group.get(key)}"
            )
    # Repeated indices must be summed before a norm can be taken.
    param.grad = grad.coalesce()
    return param.grad.values()


def check_own_numbers(
    optimizer: torch.optim.Optimizer,
    number: int,
    options: StabilizerOptions,
    device: torch.device | None,
) -> None:
    """Refuses numbers that would make parameters NaN, or raise only after the update, where no rule is fused.

    Args:
        optimizer: whose defaults name its hyper-parameters.
        number: of the param group to look at.
        options: of the step.
        device: the asynchronous one that the parameters are on, or None; numbers there are not waited for.

    Raises:
        TypeError: a proximal step needs ``lr``, and it is no number.
        ValueError: ``lr`` is negative or not finite, or another hyper-parameter is NaN.
    """
    group = optimizer.param_groups[number]
    where = f"step: param_groups[{number}]: "
    lr = group.get("lr")  # None where an optimizer finds it by itself
    shrinks = options.l1_mode == "proximal" and group.get("l1", options.l1) != 0
    needs_lr = shrinks or lr is not None or optimizer.defaults.get("lr") is not None
    if needs_lr and not is_number_on(lr, device):
        checked_number(where + "lr", lr)
    for key in optimizer.defaults:
        value = group.get(key)
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, float) and math.isnan(part):
                raise ValueError(f"{where}{key}: expected a number, got {value!r}")


def apply_proximal(
    param_groups: list[dict[str, Any]], options: StabilizerOptions, only_check: bool = False
) -> None:
    """The proximal step of the L1 penalty, after the update; or what it would refuse, before anything changes."""
    if options.l1_mode != "proximal":
        return
    for i, group in enumerate(param_groups):
        l1 = group.get("l1", options.l1)
        if l1 != 0:
            lr = checked_number(f"step: param_groups[{i}]: lr", group["lr"])
            amount = 0.0 if only_check else lr * l1
            soft_threshold_([p for p in group["params"] if p.grad is not None], amount)
