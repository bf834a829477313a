"""Computes norm, clip and penalty by torch's own operations, for tensors that no kernel takes.

The kernels take real, dense tensors that are all on the CPU, or all on one CUDA device that they were built for. All
other tensors come here: tensors on another device (MPS, XPU, ROCm, CUDA in a build without it), lists over several
devices, complex tensors, and all tensors if there is no compiled extension. The definitions are those of the kernels;
the precision is torch's, and memory is read more often. A tensor that appears twice counts once, as in the kernels.
The functions wait for a device only to raise an error that the caller has asked for. Steps do wait
(:mod:`steadygrad.optim.composite_plan`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import is_asynchronous
from steadygrad.reference.clip import clip_coefficient
from steadygrad.reference.norm import tensor_norm

_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Rows = NDArray[np.float64]
_COMPLEX = (torch.complex64, torch.complex128)


def takes(tensors: Sequence[Any]) -> bool:
    """Returns whether these tensors are for this module: torch can compute with them, and no kernel can.

    Lists that torch cannot take either (NumPy arrays, sparse tensors, integers) are left to the kernels, whose error
    says what is wrong with them.
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
    """Returns whether this build has kernels for tensors on the device."""
    if device.type == "cpu":
        return hasattr(_kernels, "Plan")  # Its stand-in, steadygrad.without_kernels, has no Plan.
    return is_asynchronous(device)


def why_no_kernel(tensors: Iterable[Tensor]) -> str | None:
    """Returns the reason why no kernel takes real tensors on these devices; None if one may."""
    devices = list(dict.fromkeys(tensor.device for tensor in tensors))
    if not has_kernels(torch.device("cpu")):
        return "there is no compiled extension"
    if torch.device("meta") in devices:
        return None  # Meta tensors have no numbers to decide by; the kernels refuse them with that reason.
    foreign = next((device for device in devices if not has_kernels(device)), None)
    if foreign is not None:
        under = "under ROCm" if foreign.type == "cuda" and torch.version.hip else "in this build"
        return f"no kernels for {foreign.type} {under}"
    if len(devices) > 1:
        return f"parameters on several devices, {', '.join(map(str, devices))}"
    return None


@torch.no_grad()
def get_total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Returns the p-norm of all elements, a 0-d tensor on the first tensor's device: fp32, or fp64 if any tensor is.

    Formula: ``(sum |x|^p)^(1/p)``, computed from the norms of single tensors. Source:
    ``torch.nn.utils.get_total_norm``.
    """
    return as_returned(wide_norm(tensors, norm_type), tensors)


@torch.no_grad()
def wide_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Returns the norm of :func:`get_total_norm`, in float64 if all tensors are on the CPU and p is more than 0.

    On the CPU a second look costs no wait, so finite elements never make the norm overflow or underflow.
    """
    distinct = list(dict.fromkeys(tensors))
    if norm_type > 0 and _can_be_read(tensors):
        norms = norms_of([tensor.detach for tensor in distinct], norm_type)
        total = combined(norms, norm_type).norm
        return torch.tensor(total, dtype=torch.float64, device="cpu")
    device = tensors[0].device
    if norm_type < 0:  # An empty list has no smallest magnitude.
        distinct = [tensor for tensor in distinct if tensor.numel() > 0] or distinct
    norms_there = [_moved(_norm(tensor, norm_type), device) for tensor in distinct]
    wide = any(norm.dtype == torch.float64 for norm in norms_there)
    stacked = torch.stack([norm.double() if wide else norm for norm in norms_there])
    if norm_type == 0:
        return stacked.sum()
    total_there: Tensor = torch.linalg.vector_norm(stacked, norm_type)
    return total_there


def as_returned(norm: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Returns the norm of these tensors in fp32, or in fp64 if any of them is in fp64."""
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return norm.to(torch.float64 if wide else torch.float32)


@torch.no_grad()
def clip_grads_with_norm_(
    grads: Sequence[Tensor], max_norm: float, total_norm: Tensor | float
) -> None:
    """Scales the gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    Source: ``torch.nn.utils.clip_grads_with_norm_``.
    """
    if math.isinf(max_norm):
        return
    distinct = list(dict.fromkeys(grads))
    if not isinstance(total_norm, Tensor) or _can_be_read([total_norm, *distinct]):
        factor = clip_coefficient(max_norm, float(total_norm))
        for grad in distinct if factor != 1 else ():
            _scale(grad, factor)
        return
    coefficient = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    there: dict[torch.device, Tensor] = {}
    for grad in distinct:
        if grad.device not in there:
            there[grad.device] = _moved(coefficient, grad.device)
        grad.mul_(there[grad.device].to(grad.real.dtype))


def _scale(grad: Tensor, factor: float) -> None:
    for part in factors(grad, factor):
        grad.mul_(part)


def factors(tensor: Tensor, factor: float) -> tuple[float, ...]:
    """Returns the factors that a tensor is multiplied by: two if their product is too small for fp32."""
    if 0 < factor < 2.0**-100 and tensor.dtype not in (torch.float64, torch.complex128):
        return 2.0**-100, factor * 2.0**100
    return (factor,)


def _can_be_read(tensors: Sequence[Tensor]) -> bool:
    """Returns whether the host can read results computed from these tensors without a wait."""
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)
        for tensor in tensors
    )


def _moved(number: Tensor, device: torch.device) -> Tensor:
    # The host reads a number at once, so the copy to the host must not be asynchronous.
    return number.to(device, non_blocking=device.type != "cpu")


def check_writable(where: str, tensor: Tensor) -> None:
    """Refuses an expanded tensor: torch would refuse it in the middle of a list, after others were changed.

    Raises:
        ValueError: Several elements share memory.
    """
    if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{where}: expected a tensor whose elements have memory of their own, got an expanded one; clone it"
        )


@torch.no_grad()
def clip_grad_value_(grads: Sequence[Tensor], clip_value: float) -> None:
    """Clamps every element to ``[-clip_value, clip_value]`` in place; a complex one by real and imaginary part."""
    for grad in grads:
        as_real(grad).clamp_(-clip_value, clip_value)


@torch.no_grad()
def add_penalty_(params: Sequence[Tensor], grads: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """Adds ``l1 * sign(p) + l2 * p`` to the gradients; returns ``l1 * sum|p| + l2 / 2 * sum p^2``, 0-d.

    The value is in float64 if all parameters are on the CPU, else in float32. The sign of a complex number is its
    direction, ``p / |p|``, and 0 for 0, as in autograd.
    """
    device = params[0].device
    dtype = torch.float64 if all(param.device.type == "cpu" for param in params) else torch.float32
    value = params[0].detach().new_zeros((), dtype=dtype)
    wide = torch.promote_types(dtype, torch.complex32)
    for param, grad in dict(zip(params, grads, strict=True)).items():
        magnitudes = param.to(wide if param.is_complex() else dtype).abs()
        if l1 != 0:
            value = value + l1 * _moved(magnitudes.sum(), device)
        if l2 != 0:
            value = value + l2 / 2 * _moved(magnitudes.square().sum(), device)
        if l1 != 0 or l2 != 0:
            grad.add_(penalty_gradient(param, l1, l2))  # A sum in fp32 is rounded once.
    return value


def penalty_gradient(param: Tensor, l1: float, l2: float) -> Tensor:
    """Returns ``l1 * sign(p) + l2 * p``, in fp32 for half precision; a weight of 0 adds nothing, not even to NaN."""
    wide = widened(param)
    if l2 == 0:
        return l1 * wide.sgn()
    return l1 * wide.sgn() + l2 * wide if l1 != 0 else l2 * wide


@torch.no_grad()
def soft_threshold_(params: Sequence[Tensor], amount: float) -> None:
    """Reduces every magnitude by ``amount`` in place, but not below 0: ``sign(p) * max(|p| - amount, 0)``."""
    if amount == 0:
        return
    for param in dict.fromkeys(params):
        wide = widened(param)
        param.sub_(wide.sgn() * wide.abs().clamp(max=amount))


@dataclass(frozen=True)
class Norm:
    """A norm on the host, and the number of elements that it leaves out.

    Attributes:
        finite_norm: Norm of the finite elements.
        nonfinite: Number of elements that are infinite or NaN; both parts of a complex one count.
        nan: Number of those that are NaN.
    """

    finite_norm: float
    nonfinite: int = 0
    nan: int = 0

    @property
    def norm(self) -> float:
        """Returns the norm of all elements: infinite or NaN if one of them is."""
        if self.nan:
            return math.nan
        return math.inf if self.nonfinite else self.finite_norm


def norms_of(values: Sequence[Callable[[], Tensor]], norm_type: float) -> list[Norm]:
    """Returns the norm of each tensor, with at most one wait for each device unless a norm needs a second look.

    Args:
        values: Functions that make the tensors, one at a time. A tensor is made twice if its norm needs a second look.
        norm_type: The exponent p, more than 0.
    """
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, value in enumerate(values):
        norm = _norm(value(), norm_type)
        by_device.setdefault(norm.device, []).append((i, norm))
    found = [0.0] * len(values)
    for norms in by_device.values():
        wide = any(norm.dtype == torch.float64 for _, norm in norms)
        stacked = torch.stack([norm.double() if wide else norm for _, norm in norms])
        for (i, _), number in zip(norms, stacked.cpu().tolist(), strict=True):
            found[i] = number
    return [
        Norm(number) if _is_ordinary(number, norm_type) else _looked_at(value(), norm_type)
        for value, number in zip(values, found, strict=True)
    ]


def _is_ordinary(norm: float, norm_type: float) -> bool:
    """Returns whether torch's norm shows that all elements are finite and that no power left the range."""
    if norm_type == 2:
        return 1e-12 < norm < math.inf
    return norm_type in (1.0, math.inf) and norm < math.inf


def _looked_at(tensor: Tensor, norm_type: float) -> Norm:
    if tensor.numel() == 0:
        return Norm(0.0)
    parts = as_real(tensor)
    finite = torch.isfinite(parts)
    nonfinite = int(finite.logical_not().sum().cpu())
    if nonfinite:
        parts = torch.where(finite, parts, torch.zeros_like(parts))
    nan = 0
    if nonfinite:
        nan = int(torch.isnan(as_real(tensor)).sum().cpu())
        tensor = torch.view_as_complex(parts) if tensor.is_complex() else parts
    magnitudes = tensor.abs()
    if magnitudes.device.type != "mps":  # MPS has no float64.
        magnitudes = magnitudes.double()
    largest = magnitudes.max()
    scale = float(largest.cpu())
    if scale == 0 or math.isinf(norm_type):
        return Norm(scale, nonfinite, nan)
    ratio = float(torch.linalg.vector_norm(magnitudes / largest, norm_type).cpu())
    return Norm(scale * ratio, nonfinite, nan)


def combined(norms: Iterable[Norm], norm_type: float) -> Norm:
    """Returns the norm of several tensors as if they were one."""
    listed = list(norms)
    finite_norm = tensor_norm(np.array([norm.finite_norm for norm in listed]), norm_type)
    return Norm(finite_norm, sum(n.nonfinite for n in listed), sum(n.nan for n in listed))


# The squares of larger norms go into another column, scaled by ``kLargeScale`` of csrc/core/norm.h.
_LARGE, _LARGE_SCALE = 1e150, 2.0**-538
_MEDIUM_COLUMN, _LARGE_COLUMN, _NONFINITE_COLUMN, _NAN_COLUMN = (
    _kernels.SCOPE_COLUMNS.index(name) for name in ("medium", "large", "nonfinite", "nan")
)


def row_of(norm: Norm, norm_type: float) -> list[float]:
    """Returns the row by which processes exchange a norm, as in ``csrc/core/scope_sums.h``; p is more than 0."""
    row = [0.0] * len(_kernels.SCOPE_COLUMNS)
    row[_NONFINITE_COLUMN], row[_NAN_COLUMN] = float(norm.nonfinite), float(norm.nan)
    if norm_type != 2:
        row[_MEDIUM_COLUMN] = norm.finite_norm
    elif norm.finite_norm > _LARGE:
        row[_LARGE_COLUMN] = (norm.finite_norm * _LARGE_SCALE) ** 2
    else:
        row[_MEDIUM_COLUMN] = norm.finite_norm**2
    return row


def reduced(rows: Rows, reduction: _kernels.Reduction, norm_type: float) -> list[Norm]:
    """Returns the norms over all processes from the rows of this one; the first row holds flags and no norm."""
    reduction.rows.copy_(torch.from_numpy(rows))
    assert reduction.reduce is not None
    reduction.reduce()
    flags, *others = reduction.rows.cpu().numpy()
    return [_norm_of(flags, 1.0), *(_norm_of(row, norm_type) for row in others)]


def with_flags(total: Norm, flags: Norm) -> Norm:
    """Returns the total norm, made non-finite if a replica had non-finite elements that no scope counts."""
    if total.nonfinite > 0 or flags.nonfinite == 0:
        return total
    return Norm(total.finite_norm, flags.nonfinite)


@torch.no_grad()
def reduced_norm(
    tensors: Sequence[Tensor], norm_type: float, reduction: _kernels.Reduction
) -> Norm:
    """Returns the norm of the tensors of all processes, of which this one may have none; waits for devices."""
    norms = norms_of([tensor.detach for tensor in tensors], norm_type)
    counted = reduction.counted.tolist()
    here = [norm for norm, counts in zip(norms, counted, strict=True) if counts]
    flags = Norm(0.0, sum(norm.nonfinite for norm in norms))
    rows = np.array([row_of(flags, 1.0), row_of(combined(here, norm_type), norm_type)])
    flags, total = reduced(rows, reduction, norm_type)
    return with_flags(total, flags)


def _norm_of(row: Rows, norm_type: float) -> Norm:
    medium, large = float(row[_MEDIUM_COLUMN]), float(row[_LARGE_COLUMN])
    if norm_type == 2 and large > 0:
        medium = math.sqrt(large + medium * _LARGE_SCALE**2) / _LARGE_SCALE
    elif norm_type == 2:
        medium = math.sqrt(medium)
    return Norm(medium, int(row[_NONFINITE_COLUMN]), int(row[_NAN_COLUMN]))


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


def widened(tensor: Tensor) -> Tensor:
    """Returns a half-precision tensor in fp32, and any other tensor unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def as_real(tensor: Tensor) -> Tensor:
    """Returns a complex tensor as real and imaginary parts in the same memory, and any other unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
