"""L1 and L2 penalties on parameters, without autograd: added to the gradients, or applied as a proximal step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.clip import as_list, as_number, device_of
from steadygrad.memory import allocator


def add_penalty_(params: Iterable[Tensor] | Tensor, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    r"""Adds the gradient of :math:`l_1 \sum |p| + \tfrac{l_2}{2} \sum p^2` to ``p.grad`` and returns its value.

    What autograd would have added had the penalty been part of the loss, in one pass over memory:
    :math:`g \leftarrow g + l_1 \operatorname{sign}(p) + l_2 p` with :math:`\operatorname{sign}(0) = 0`.

    Args:
        params: parameters of any shape; those without a gradient take no part, also not in the value.
        l1: weight of the sum of magnitudes, at least 0.
        l2: weight of half the sum of squares, at least 0.

    Returns:
        The penalty's value, a 0-d float64 tensor on the parameters' device, which is not waited for.

    Raises:
        TypeError: a parameter or gradient is sparse, complex, on another device than the others, or of another dtype.
        ValueError: ``l1`` or ``l2`` is negative or NaN.
    """
    listed = [p for p in as_list("add_penalty_", "params", params) if _grad(p) is not None]
    grads = [p.grad for p in listed if p.grad is not None]
    device = device_of(listed)
    there = None if device is None else torch.empty((), dtype=torch.float64, device=device)
    value = _kernels.add_penalty_(
        listed,
        grads,
        as_number("add_penalty_", "l1", l1),
        as_number("add_penalty_", "l2", l2),
        there,
        allocator(device),
    )
    return torch.tensor(value, dtype=torch.float64, device="cpu") if there is None else there


def _grad(param: Tensor) -> Tensor | None:
    if not isinstance(param, Tensor):
        raise TypeError(f"add_penalty_: params: expected torch.Tensors, got {type(param).__name__}")
    return param.grad


def soft_threshold_(params: Iterable[Tensor] | Tensor, amount: float) -> None:
    r"""The proximal step of an L1 penalty: :math:`p \leftarrow \operatorname{sign}(p) \max(|p| - \text{amount}, 0)`.

    Unlike a penalty's gradient it gives exact zeros.

    Args:
        params: tensors of any shape, changed in place.
        amount: what is taken from every magnitude, at least 0; for an L1 penalty, learning rate times ``l1``.

    Raises:
        TypeError: a parameter is sparse, complex, on another device than the others, or of another dtype.
        ValueError: ``amount`` is negative or NaN.

    Source: Parikh and Boyd 2014, Proximal Algorithms, section 6.5.2.
    """
    listed = as_list("soft_threshold_", "params", params)
    number = as_number("soft_threshold_", "amount", amount)
    _kernels.soft_threshold_(listed, number, allocator(device_of(listed)))
