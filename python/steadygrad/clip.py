"""Gradient clipping for lists of parameters: drop-ins for ``torch.nn.utils``."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from steadygrad import _kernels, composite
from steadygrad.arguments import converted_to_float
from steadygrad.distributed.dtensors import (
    has_dtensors,
    local_gradients,
    local_tensors,
    without_partial,
)
from steadygrad.distributed.norms import NormReduction
from steadygrad.distributed.parts import part_of_fsdp1
from steadygrad.distributed.sharding import list_reduction
from steadygrad.memory import NormOutput, allocator, is_asynchronous, is_number_on
from steadygrad.without_kernels import check_not_negative


def as_list(function: str, argument: str, tensors: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Returns the tensors as a list; a single tensor becomes a list of one."""
    if isinstance(tensors, Tensor):
        return [tensors]
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(
            f"{function}: {argument}: expected a tensor or an iterable of tensors, "
            f"got {type(tensors).__name__}"
        ) from None


def _clipped_list(function: str, parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Returns the parameters as a list, and warns as torch does of a used-up generator, which clips nothing."""
    listed = as_list(function, "parameters", parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3
        )
    return listed


def grads_of(function: str, parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Returns the gradients of those parameters that have one."""
    listed = as_list(function, "parameters", parameters)
    try:
        return [grad for p in listed if (grad := p.grad) is not None]
    except AttributeError:
        i, wrong = next((i, p) for i, p in enumerate(listed) if not hasattr(p, "grad"))
        raise TypeError(
            f"{function}: parameters[{i}]: expected a torch.Tensor, got {type(wrong).__name__}"
        ) from None


def writable_grads_of(function: str, parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Returns the gradients to write to; for DTensors, the parts of the gradients that this process holds."""
    listed = as_list(function, "parameters", parameters)
    if not has_dtensors(listed):
        return grads_of(function, listed)
    grads = local_gradients(function, list(dict.fromkeys(listed)))
    return _announced(listed, [grad for grad in grads if grad is not None])


def _announced(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Bumps the version counters of the DTensors that hold ``grads``: kernels bump only those of the local tensors."""
    increment_version([grad for p in params if (grad := p.grad) is not None])
    return grads


def as_number(function: str, argument: str, value: float | Tensor) -> float:
    """Converts the value to a float, or raises an error that names the argument."""
    return converted_to_float(f"{function}: {argument}", value, "a number", _Described(value))


class _Described:
    """Prints a tensor by its shape and device instead of all its elements."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __repr__(self) -> str:
        value = self._value
        if isinstance(value, Tensor):
            return f"Tensor (shape {tuple(value.shape)}, device {value.device})"
        return type(value).__name__


def device_of(tensors: list[Tensor]) -> torch.device | None:
    """Returns the device of the first tensor if it is asynchronous; the kernels check that all tensors are on it."""
    device = getattr(tensors[0], "device", None) if tensors else None
    # The device of a NumPy array is a string. The kernels refuse NumPy arrays with a message of their own.
    return device if isinstance(device, torch.device) and is_asynchronous(device) else None


def _refuse_nonfinite(function: str, norm: Tensor, nonfinite: int) -> None:
    if nonfinite:
        raise RuntimeError(
            f"{function}: error_if_nonfinite: expected finite gradients, got {nonfinite} non-finite "
            f"elements (total norm {norm.item()}); the gradients were left as they are"
        )


def _norm_of_all(
    function: str,
    tensors: list[Tensor],
    first: Tensor,
    norm_type: float,
    reduction: NormReduction,
    error_if_nonfinite: bool,
) -> tuple[float, Tensor]:
    """The norm over all ranks where no kernel takes the tensors, as a number and as it is returned."""
    norm = composite.reduced_norm(tensors, norm_type, reduction.for_kernels)
    number = torch.tensor(norm.norm, dtype=torch.float64, device="cpu")
    result = composite.as_returned(number, tensors).to(first.device)
    if error_if_nonfinite:
        _refuse_nonfinite(function, result, norm.nonfinite)
    return norm.norm, result


def _check_writable(function: str, grads: list[Tensor]) -> None:
    for i, grad in enumerate(grads):
        composite.check_writable(f"{function}: parameters.grad[{i}]", grad)


def get_total_norm(
    tensors: Iterable[Tensor] | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Returns the norm of all elements of ``tensors``, as if they were one vector: :math:`(\sum |x|^p)^{1/p}`.

    The result is within one ulp of fp32 of the float64 result, whatever the dtype. It never overflows or underflows
    for finite elements, and has the same bits on every run and for every number of threads. The tensors are read once
    for p in {2, 1, inf}, and twice for any other p.

    Args:
        tensors: Dense tensors of any shape; float32, float64, bfloat16, float16, or complex. The kernels take tensors
            that are all on the CPU or all on one CUDA device. Tensors on other devices or on several devices, and
            complex tensors with a norm other than p = 2, go through torch's own operations, with their precision.
            A tensor that appears twice counts once. An empty list has norm 0. For DTensors the norm is that of all
            ranks together and takes one collective, so all ranks of their meshes have to call this function with the
            same number of tensors. If some ranks have parameters without a gradient, use :func:`clip_grad_norm_`.
        norm_type: The exponent p. ``inf`` is the largest magnitude, ``-inf`` the smallest, 0 the number of non-zeros.
            Default: 2.
        error_if_nonfinite: Whether to wait for the device and raise if an element is infinite or NaN. Default: False.
        foreach: Accepted for compatibility with torch; there is only one implementation.

    Returns:
        A 0-d tensor on the tensors' device, without waiting for the device: float64 if any tensor is float64, else
        float32. For DTensors it is a plain tensor with the same value on all ranks.

    Raises:
        TypeError: A tensor is sparse or of another dtype, or is not a tensor.
        ValueError: ``norm_type`` is NaN.
        RuntimeError: Under ``error_if_nonfinite`` some rank has non-finite elements; a process group was destroyed; or
            ranks hold different DTensors.

    Source: ``torch.nn.utils.get_total_norm``.
    """
    del foreach
    listed = as_list("get_total_norm", "tensors", tensors)
    p = as_number("get_total_norm", "norm_type", norm_type)
    reduction = None
    if has_dtensors(listed):
        listed = without_partial(list(dict.fromkeys(listed)))
        reduction = list_reduction("get_total_norm", listed, [True] * len(listed), p)
        listed = local_tensors(listed)
    device = device_of(listed)
    output = NormOutput(device)
    try:
        norm, nonfinite, is_float64 = _kernels.grad_norm(
            listed,
            p,
            output.tensors,
            allocator(device),
            None if reduction is None else reduction.for_kernels,
        )
    except TypeError:
        if reduction is not None and p > 0 and composite.why_no_kernel(listed) is not None:
            return _norm_of_all(
                "get_total_norm", listed, listed[0], p, reduction, error_if_nonfinite
            )[1]
        if reduction is not None or not composite.takes(listed):
            raise
        result = composite.get_total_norm(listed, p)
        if error_if_nonfinite:
            _refuse_nonfinite("get_total_norm", result, composite.nonfinite_count(listed))
        return result
    result = output.result(norm, wide=is_float64)
    if error_if_nonfinite:
        _refuse_nonfinite("get_total_norm", result, output.nonfinite(nonfinite))
    return result


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scales the gradients in place so that their total norm is at most ``max_norm``.

    :math:`g \leftarrow g \cdot \min(1, \text{max\_norm} / (N + 10^{-6}))` with the norm :math:`N` of
    :math:`g \leftarrow g \cdot \min(1, \text{max\_norm} / (N + 10^{-6}))` with the norm :math:`N` of
    :func:`get_total_norm`. The coefficient is computed from the norm in double precision, so finite gradients whose
    norm exceeds the range of fp32 are clipped correctly. Gradients that are within the limit are not written to. A
    generator that yields no parameters, for example because it was iterated over before, gives a ``UserWarning``.

    Args:
        parameters: Tensors whose ``.grad`` is clipped; tensors without a gradient are left out. If there are DTensors
            among them, every rank of their meshes has to pass the same parameters, with or without gradients: the norm
            is that of all ranks together, takes one collective, and counts plain tensors once.
        max_norm: The limit, at least 0. With ``inf`` the function only computes the norm.
        norm_type: The exponent p; see :func:`get_total_norm`. Default: 2.
        error_if_nonfinite: Whether to wait for the device and raise if an element is infinite or NaN, leaving the
            gradients as they are. If False, the result is torch's: an infinite norm makes the finite elements 0, a NaN
            norm makes all elements NaN. Default: False.
        foreach: Accepted for compatibility with torch; there is only one implementation.

    Returns:
        The total norm before clipping, a 0-d tensor on the gradients' device, without waiting for the device: float64
        if any gradient is float64, else float32. For DTensors it is a plain tensor with the same value on all ranks.

    Raises:
        TypeError: A gradient is sparse or of another dtype.
        ValueError: ``max_norm`` is negative or NaN, ``norm_type`` is NaN, or a parameter is one that FSDP1 has split
            over ranks; the message says what to write instead.
        RuntimeError: Under ``error_if_nonfinite`` some rank has non-finite elements; a process group was destroyed; or
            ranks hold different DTensors.

    Source: ``torch.nn.utils.clip_grad_norm_``; Pascanu, Mikolov and Bengio 2013, algorithm 1.
    """
    del foreach
    listed = _clipped_list("clip_grad_norm_", parameters)
    limit = as_number("clip_grad_norm_", "max_norm", max_norm)
    p = as_number("clip_grad_norm_", "norm_type", norm_type)
    part = part_of_fsdp1(listed)
    if part is not None:
        raise ValueError(
            f"clip_grad_norm_: parameters[{part}]: expected a whole parameter or a DTensor, got one that "
            "FullyShardedDataParallel has split over the ranks. Write instead: "
            "norm = sg.get_total_norm([p.grad for p in parameters if p.grad is not None]); "
            "norm = sg.distributed.reduce_norm(norm, model.process_group) (not under ShardingStrategy.NO_SHARD); "
            "sg.clip_grads_with_norm_(parameters, max_norm, norm)"
        )
    reduction = None
    if has_dtensors(listed):
        listed = list(dict.fromkeys(listed))
        parts = local_gradients("clip_grad_norm_", listed)
        taken = [part is not None for part in parts]
        reduction = list_reduction("clip_grad_norm_", listed, taken, p)
        grads = _announced(listed, [part for part in parts if part is not None])
        device = device_of(local_tensors(listed[:1]))  # a rank without gradients has a device, too
    else:
        grads = grads_of("clip_grad_norm_", listed)
        device = device_of(grads)
    output = NormOutput(device)
    try:
        norm, nonfinite, is_float64 = _kernels.clip_grad_norm_(
            grads,
            limit,
            p,
            bool(error_if_nonfinite),
            output.tensors,
            allocator(device),
            None if reduction is None else reduction.for_kernels,
        )
    except TypeError:
        params = local_tensors(listed)
        if reduction is not None and p > 0 and composite.why_no_kernel(params) is not None:
            _check_writable("clip_grad_norm_", grads)
            number, result = _norm_of_all(
                "clip_grad_norm_", grads, params[0], p, reduction, error_if_nonfinite
            )
            composite.clip_grads_with_norm_(grads, limit, number)
            return result
        if reduction is not None or not composite.takes(grads):
            raise
        _check_writable("clip_grad_norm_", grads)
        total = composite.wide_norm(grads, p)
        result = composite.as_returned(total, grads)
        if error_if_nonfinite:
            _refuse_nonfinite("clip_grad_norm_", result, composite.nonfinite_count(grads))
        composite.clip_grads_with_norm_(grads, limit, total)
        return result
    result = output.result(norm, wide=is_float64)
    if error_if_nonfinite:
        _refuse_nonfinite("clip_grad_norm_", result, output.nonfinite(nonfinite))
    return result


def clip_grads_with_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
) -> None:
    r"""Scales the gradients in place by :math:`\min(1, \text{max\_norm} / (\text{total\_norm} + 10^{-6}))`.

    Args:
        parameters: Tensors whose ``.grad`` is scaled; tensors without a gradient are left out.
        max_norm: The limit, at least 0.
        total_norm: A norm computed before, by :func:`get_total_norm` or over a larger set of gradients.
        foreach: Accepted for compatibility with torch; there is only one implementation.

    Raises:
        TypeError: A gradient is sparse or of another dtype.
        ValueError: ``max_norm`` is negative or NaN.

    Source: ``torch.nn.utils.clip_grads_with_norm_``.
    """
    del foreach
    listed = _clipped_list("clip_grads_with_norm_", parameters)
    grads = writable_grads_of("clip_grads_with_norm_", listed)
    device = device_of(grads)
    norm = total_norm
    if isinstance(norm, Tensor) and has_dtensors([norm]):
        norm = norm.full_tensor()  # type: ignore[attr-defined]
    limit = as_number("clip_grads_with_norm_", "max_norm", max_norm)
    if (
        isinstance(norm, Tensor)
        and not composite.has_kernels(norm.device)
        and composite.takes(grads)
    ):
        check_not_negative("clip_grads_with_norm_", "max_norm", limit)
        _check_writable("clip_grads_with_norm_", grads)
        return composite.clip_grads_with_norm_(grads, limit, norm)
    if not is_number_on(norm, device):
        norm = as_number("clip_grads_with_norm_", "total_norm", norm)
    try:
        _kernels.clip_grads_with_norm_(grads, limit, norm, allocator(device))
    except TypeError:
        if not composite.takes(grads):
            raise
        _check_writable("clip_grads_with_norm_", grads)
        composite.clip_grads_with_norm_(grads, limit, norm)


def clip_grad_value_(
    parameters: Iterable[Tensor] | Tensor, clip_value: float, foreach: bool | None = None
) -> None:
    r"""Clamps every gradient element to :math:`[-\text{clip\_value}, \text{clip\_value}]` in place; NaN stays NaN.

    Args:
        parameters: Tensors whose ``.grad`` is clamped; tensors without a gradient are left out.
        clip_value: The largest magnitude allowed, at least 0.
        foreach: Accepted for compatibility with torch; there is only one implementation.

    Raises:
        TypeError: A gradient is sparse, complex, or of another dtype.
        ValueError: ``clip_value`` is negative or NaN.

    Source: ``torch.nn.utils.clip_grad_value_``.
    """
    del foreach
    listed = _clipped_list("clip_grad_value_", parameters)
    grads = writable_grads_of("clip_grad_value_", listed)
    number = as_number("clip_grad_value_", "clip_value", clip_value)
    try:
        _kernels.clip_grad_value_(grads, number, allocator(device_of(grads)))
    except TypeError:
        if not composite.takes(grads) or any(grad.is_complex() for grad in grads):
            raise
        _check_writable("clip_grad_value_", grads)
        composite.clip_grad_value_(grads, number)
