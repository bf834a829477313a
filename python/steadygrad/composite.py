"""Norm, clip and penalty in torch's own operations, for tensors that no kernel takes.

The kernels take real, dense tensors that are all on the CPU, or all on one CUDA device that they were built for. All
others come here: tensors on another device (MPS, XPU, ROCm, CUDA in a build without it), lists over several devices,
and complex tensors. The definitions are the same as the kernels'; the precision is torch's, and memory is read more
often. A tensor that appears twice counts once, as with the kernels. Nothing here waits for a device, except to raise an
error that the caller has asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels

_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPLEX = (torch.complex64, torch.complex128)


def takes(tensors: Sequence[Any]) -> bool:
    """Tells whether these tensors are for this module: torch can compute with them, and no kernel can.

    Lists that torch cannot compute with either (NumPy arrays, sparse tensors, integers) are left to the kernels, whose
    error says what is wrong with them.
    """
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    if any(t.layout != torch.strided or t.dtype not in (*_REAL, *_COMPLEX) for t in tensors):
        return False
    devices = {tensor.device for tensor in tensors}
    return (
        len(devices) > 1
        or any(tensor.is_complex() for tensor in tensors)
        or not has_kernels(devices.pop())
    )


def has_kernels(device: torch.device) -> bool:
    """Tells whether this build has kernels for tensors on the device."""
    return device.type == "cpu" or (
        device.type == "cuda" and torch.version.hip is None and _kernels.is_asynchronous("cuda")
    )


@torch.no_grad()
def get_total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Returns the p-norm of all elements, a 0-d tensor on the first tensor's device: fp32, or fp64 if any tensor is.

    Formula: ``(sum |x|^p)^(1/p)``, computed from the norms of single tensors. Source:
    ``torch.nn.utils.get_total_norm``.
    """
    device = tensors[0].device
    norms = [
        _norm(tensor, norm_type).to(device, non_blocking=True) for tensor in dict.fromkeys(tensors)
    ]
    wide = any(norm.dtype == torch.float64 for norm in norms)
    stacked = torch.stack([norm.double() if wide else norm for norm in norms])
    if norm_type == 0:
        return stacked.sum()
    total: Tensor = torch.linalg.vector_norm(stacked, norm_type)
    return total


@torch.no_grad()
def clip_grads_with_norm_(
    grads: Sequence[Tensor], max_norm: float, total_norm: Tensor | float
) -> None:
    """Scales the gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    Source: ``torch.nn.utils.clip_grads_with_norm_``.
    """
    if math.isinf(max_norm):
        return
    norm = torch.as_tensor(total_norm)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    there: dict[torch.device, Tensor] = {}
    for grad in dict.fromkeys(grads):
        if grad.device not in there:
            there[grad.device] = coefficient.to(grad.device, non_blocking=True)
        grad.mul_(there[grad.device].to(grad.real.dtype))


@torch.no_grad()
def clip_grad_value_(grads: Sequence[Tensor], clip_value: float) -> None:
    """Clamps every element to ``[-clip_value, clip_value]`` in place; a complex one by real and imaginary part."""
    for grad in grads:
        _as_real(grad).clamp_(-clip_value, clip_value)


@torch.no_grad()
def add_penalty_(params: Sequence[Tensor], grads: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """Adds ``l1 * sign(p) + l2 * p`` to the gradients; returns ``l1 * sum|p| + l2 / 2 * sum p^2``, 0-d.

    The sign of a complex number is its direction, ``p / |p|``, and 0 for 0, as in autograd.
    """
    value = torch.zeros((), device=params[0].device)
    for param, grad in dict(zip(params, grads, strict=True)).items():
        wide = _widened(param)
        term = l1 * wide.sgn() + l2 * wide
        grad.add_(term)  # The sum is in fp32 if the term is, and is rounded once.
        if l1 != 0:
            value = value + l1 * _norm(param, 1.0).to(value.device)
        if l2 != 0:
            value = value + l2 / 2 * _norm(param, 2.0).square().to(value.device)
    return value


@torch.no_grad()
def soft_threshold_(params: Sequence[Tensor], amount: float) -> None:
    """Reduces every magnitude by ``amount`` in place, but not below 0: ``sign(p) * max(|p| - amount, 0)``."""
    if amount == 0:
        return
    for param in dict.fromkeys(params):
        wide = _widened(param)
        param.sub_(wide.sgn() * wide.abs().clamp(max=amount))


def nonfinite_count(tensors: Sequence[Tensor]) -> int:
    """Returns how many elements are infinite or NaN; waits for every device."""
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)


def _norm(tensor: Tensor, norm_type: float) -> Tensor:
    wide = tensor.dtype in (torch.float64, torch.complex128)
    dtype = torch.float64 if wide else torch.float32
    if tensor.numel() == 0:
        return torch.zeros((), dtype=dtype, device=tensor.device)
    computed: Tensor = torch.linalg.vector_norm(
        tensor, norm_type, dtype=tensor.dtype if tensor.is_complex() else dtype
    )
    return computed.to(dtype)


def _widened(tensor: Tensor) -> Tensor:
    """Returns a half-precision tensor in fp32, and any other tensor unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
