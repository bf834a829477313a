"""Gives the kernels the part of each DTensor that this process holds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def dtensor_type() -> type[Any] | None:
    """Returns ``torch.distributed.tensor.DTensor``; None if it was never imported, so that no DTensor can exist."""
    module = sys.modules.get("torch.distributed.tensor")
    found: type[Any] | None = getattr(module, "DTensor", None)
    return found


def has_dtensors(tensors: Iterable[object]) -> bool:
    """Returns whether any of the tensors is a DTensor."""
    kind = dtensor_type()
    return kind is not None and any(type(tensor) is kind for tensor in tensors)


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this process's part of a DTensor, sharing its memory; returns any other tensor unchanged."""
    kind = dtensor_type()
    if kind is None or type(tensor) is not kind:
        return tensor
    return _arrived(tensor._local_tensor)  # type: ignore[attr-defined]


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns :func:`local_tensor` of each tensor."""
    return [local_tensor(tensor) for tensor in tensors]


def _arrived(local: Tensor) -> Tensor:
    """Queues a wait for the collective that still fills the tensor, if any, and returns a tensor of the same memory."""
    if type(local) is Tensor:
        return local
    wait = getattr(local, "trigger_wait", None)
    arrived: Tensor = local if wait is None else wait()
    return arrived


def without_partial(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Replaces DTensors that hold partial sums by the sums; all ranks of their meshes have to call it."""
    return [_summed(tensor) for tensor in tensors]


def _summed(tensor: Tensor) -> Tensor:
    kind = dtensor_type()
    if kind is None or type(tensor) is not kind:
        return tensor
    placements = tensor.placements  # type: ignore[attr-defined]
    if not any(placement.is_partial() for placement in placements):
        return tensor
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if placement.is_partial() else placement for placement in placements]
    with torch.no_grad():
        summed: Tensor = tensor.redistribute(placements=whole)  # type: ignore[attr-defined]
    return summed


def local_gradients(
    function: str, params: Sequence[Tensor], sums: dict[Tensor, Tensor] | None = None
) -> list[Tensor | None]:
    """Returns this process's part of each parameter's gradient, laid out like the parameter; None for no gradient.

    A gradient with another layout than its parameter, such as a partial sum, is redistributed first and replaces the
    old one. All ranks of the mesh have to call it then.

    Args:
        function: The function's name, with which messages start.
        params: The parameters.
        sums: Gradients by parameter that are used instead of ``.grad``.

    Raises:
        TypeError: A parameter is a DTensor and its gradient is not, or the reverse.
    """
    kind = dtensor_type()
    found: list[Tensor | None] = []
    for index, param in enumerate(params):
        total = sums.get(param) if sums else None
        grad: Any = param.grad if total is None else total
        if grad is not None:
            sharded = type(grad) is kind
            if sharded is not (type(param) is kind):
                raise TypeError(
                    f"{function}: parameters[{index}].grad: expected a {type(param).__name__}, as the parameter "
                    f"is, got {type(grad).__name__}"
                )
            if sharded:
                here, there = grad._spec, param._spec  # type: ignore[attr-defined]
                if here is not there and (
                    here.mesh is not there.mesh or here.placements != there.placements
                ):
                    grad = _laid_out_as(param, grad)
                    if total is None or sums is None:
                        param.grad = grad
                    else:
                        sums[param] = grad
                grad = grad._local_tensor
                if type(grad) is not Tensor:
                    grad = _arrived(grad)
        found.append(grad)
    return found


def _laid_out_as(param: Any, grad: Any) -> Any:
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        with torch.no_grad():
            grad = grad.redistribute(param.device_mesh, param.placements)
    return grad
