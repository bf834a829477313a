"""What the in-place path does around another optimizer's own step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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


def apply_proximal(param_groups: list[dict[str, Any]], options: StabilizerOptions) -> None:
    """The proximal step of the L1 penalty, after the update."""
    if options.l1_mode != "proximal":
        return
    for i, group in enumerate(param_groups):
        l1 = group.get("l1", options.l1)
        if l1 != 0:
            lr = checked_number(f"step: param_groups[{i}]: lr", group["lr"])
            soft_threshold_([p for p in group["params"] if p.grad is not None], lr * l1)
