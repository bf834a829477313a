"""L1 and L2 penalties on parameters without autograd, added to the gradients or applied as a proximal step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from steadygrad import _kernels, composite
from steadygrad.clip import as_list, as_number, device_of
from steadygrad.distributed.dtensors import has_dtensors, local_gradients, local_tensors
from steadygrad.distributed.layout import layout_of
from steadygrad.distributed.sharding import reduced_sum
from steadygrad.memory import allocator


def add_penalty_(params: Iterable[Tensor] | Tensor, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    r"""Adds the gradient of :math:`l_1 \sum |p| + \tfrac{l_2}{2} \sum p^2` to ``p.grad`` and returns its value.

    The gradients become what autograd would give if the penalty were part of the loss, in one pass over memory:
    :math:`g \leftarrow g + l_1 \operatorname{sign}(p) + l_2 p` with :math:`\operatorname{sign}(0) = 0`.

    Args:
        params: Parameters of any shape. Parameters without a gradient are left out, also of the penalty's value. If
            there are DTensors among them, every rank of their meshes has to pass the same parameters.
        l1: Weight of the sum of magnitudes, at least 0. Default: 0.
        l2: Weight of half the sum of squares, at least 0. Default: 0.

    Returns:
        The penalty's value, a 0-d float64 tensor on the parameters' device, without waiting for the device (float32 on
        devices without kernels). For DTensors it is the value over all ranks together.

    Raises:
        TypeError: A parameter or gradient is sparse or of another dtype.
        ValueError: ``l1`` or ``l2`` is negative or NaN.
    """
    given = as_list("add_penalty_", "params", params)
    weights = as_number("add_penalty_", "l1", l1), as_number("add_penalty_", "l2", l2)
    if has_dtensors(given):
        return _add_to_shards(list(dict.fromkeys(given)), *weights)
    listed = [p for p in given if _grad(p) is not None]
    grads = [p.grad for p in listed if p.grad is not None]
    return _add(listed, grads, *weights, device_of(listed))


def _add(
    params: list[Tensor], grads: list[Tensor], l1: float, l2: float, device: torch.device | None
) -> Tensor:
    try:
        return _add_by_kernels(params, grads, l1, l2, device)
    except TypeError:
        if not composite.takes([*params, *grads]):
            raise
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            where = f"add_penalty_: params[{i}].grad"
            composite.check_writable(where, grad)
            if param.shape != grad.shape:
                raise ValueError(
                    f"{where}: expected the parameter's shape, {tuple(param.shape)}, got {tuple(grad.shape)}"
                ) from None
        return composite.add_penalty_(params, grads, l1, l2)


def _add_by_kernels(
    params: list[Tensor], grads: list[Tensor], l1: float, l2: float, device: torch.device | None
) -> Tensor:
    if device is None or not params:
        value = _kernels.add_penalty_(params, grads, l1, l2, None, allocator(device))
        return torch.tensor(value, dtype=torch.float64, device=device or "cpu")
    there = torch.empty((), dtype=torch.float64, device=device)
    _kernels.add_penalty_(params, grads, l1, l2, there, allocator(device))
    return there


def _add_to_shards(params: list[Tensor], l1: float, l2: float) -> Tensor:
    """Adds the penalty's gradient on every replica of a part, and counts the penalty's value on one of them."""
    layout = layout_of("add_penalty_", params)
    grads = local_gradients("add_penalty_", params)
    increment_version([p.grad for p in params if p.grad is not None])
    device = device_of(local_tensors(params[:1]))
    values = []
    for counts in (True, False):
        chosen = [
            (param, grad)
            for param, grad, counted in zip(
                local_tensors(params), grads, layout.counted, strict=True
            )
            if grad is not None and counted is counts
        ]
        values.append(_add([p for p, _ in chosen], [g for _, g in chosen], l1, l2, device))
    # A rank whose parts count nothing may have its value elsewhere, where no kernel takes the others.
    where = local_tensors(params[:1])[0].device
    return reduced_sum("add_penalty_", layout, values[0].to(where, torch.float64))


def _grad(param: Tensor) -> Tensor | None:
    if not isinstance(param, Tensor):
        raise TypeError(f"add_penalty_: params: expected torch.Tensors, got {type(param).__name__}")
    return param.grad


def soft_threshold_(params: Iterable[Tensor] | Tensor, amount: float) -> None:
    r"""Applies the proximal step of an L1 penalty: :math:`p \leftarrow \operatorname{sign}(p) \max(|p| - a, 0)`.

    Here :math:`a` is ``amount``. Unlike the gradient of a penalty, this step makes small elements exactly zero.

    Args:
        params: Tensors of any shape, changed in place.
        amount: What is subtracted from every magnitude, at least 0. For an L1 penalty this is the learning rate times
            ``l1``.

    Raises:
        TypeError: A parameter is sparse or of another dtype.
        ValueError: ``amount`` is negative or NaN.

    Source: Parikh and Boyd 2014, Proximal Algorithms, section 6.5.2.
    """
    listed = as_list("soft_threshold_", "params", params)
    number = as_number("soft_threshold_", "amount", amount)
    if has_dtensors(listed):
        if number > 0:
            increment_version(listed)  # the kernels bump only the versions of the local tensors
        listed = local_tensors(dict.fromkeys(listed))
    try:
        _kernels.soft_threshold_(listed, number, allocator(device_of(listed)))
    except TypeError:
        if not composite.takes(listed):
            raise
        for i, param in enumerate(listed):
            composite.check_writable(f"soft_threshold_: params[{i}]", param)
        composite.soft_threshold_(listed, number)
