"""The functional form of batch normalization, which decides between the kernels and torch's operation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from steadygrad.composite import has_kernels
from steadygrad.nn import gradient, operators
from steadygrad.nn.gradient import Options
from steadygrad.nn.synchronized import synchronized_batch_norm
from steadygrad.reference.batch_norm import CEILINGS
from steadygrad.reference.batch_norm import Activation as Activation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PLAIN = (Tensor, Parameter)
_TRACED = (Tensor, Parameter, FakeTensor, FunctionalTensor)
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
# CUDA tensors go to torch if the wheel has no CUDA kernels, or if this torch was built for ROCm.
_ON_CPU, _ON_CUDA = (has_kernels(torch.device(device)) for device in ("cpu", "cuda"))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    num_batches_tracked: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Normalises each channel of a batch, and optionally adds a residual and applies ReLU or ReLU6 in the same pass.

    .. math::

        y = \operatorname{activation}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \, w + b + \text{residual}\right)

    In training :math:`\mu` and :math:`\sigma^2` are the batch's mean and biased variance of each channel, else the
    running ones. They are computed in float64, with the same precision in every memory format. The output is dense. It
    has channels last if the input has (also in 3-D, where torch makes it contiguous), and is contiguous otherwise. With
    an activation no output is kept for the backward pass; with a residual, too, one bit per element is kept.

    Calls that the kernels do not take go to :func:`torch.nn.functional.batch_norm`: devices other than CPU and CUDA,
    subclasses of tensors, transforms of :mod:`torch.func`, forward-mode derivatives, and empty batches. So does
    everything that is exported (:mod:`torch.export`, ONNX, ``torch.jit.trace``), so that exported files run without
    this package. Autocast does not change the dtype of the input, as for torch's batch norm.

    A channel whose batch mean or variance is not finite, or whose running mean or variance would not be, does not enter
    the running statistics. In torch one such batch makes them NaN or infinite for ever, even if a stabilized optimizer
    skips the step. The batch counts in ``num_batches_tracked``, so under ``momentum=None`` it counts like a batch that
    was equal to the average so far.

    In evaluation the backward pass reads the running statistics. If a call in training has changed them in between, it
    raises autograd's ``RuntimeError`` ("modified by an inplace operation"); torch computes a wrong gradient then.

    Args:
        input: Input of shape (N, C) or (N, C, ...), in float32, float64, bfloat16 or float16, with any strides.
        running_mean: Running mean, shape (C), updated in place in training; or None.
        running_var: Running variance, shape (C), updated in place in training with the unbiased variance; or None.
        weight: Weight of shape (C), or None for 1. Weight, bias and running statistics have the input's dtype, or
            float32 if the input has half precision. Default: None.
        bias: Bias of shape (C), or None for 0. Default: None.
        training: Whether to normalise with the batch's statistics. Default: False.
        momentum: Weight of the batch in the running statistics; None for the average of all batches, which
            needs ``num_batches_tracked``. Default: 0.1.
        eps: Number added to the variance, positive; 0 is allowed if not training. Default: 1e-5.
        residual: Tensor added before the activation, of the input's shape, dtype and device, with any strides. Under
            autocast another dtype is promoted as in ``batch_norm(...) + residual``. Default: None.
        activation: ``"relu"``, ``"relu6"``, which is :math:`\min(\max(y, 0), 6)`, or None. At the bounds the gradient
            is 0, and NaN lets it through. Default: None.
        num_batches_tracked: 0-d int64 tensor that goes up by one in training, without waiting for the device; or None.
            Default: None.
        process_group: In training, statistics are computed over all ranks of this group;
            :func:`~steadygrad.nn.synchronized.synchronized_batch_norm` says how. None for this process alone.
            Default: None.

    Returns:
        The output, with the shape and dtype of ``input``.

    Raises:
        ValueError: There is one value per channel in training, ``eps`` is out of range, or the activation is unknown.
        RuntimeError: An argument has another number of channels than the input, the input has less than 2 dimensions,
            the residual has another shape or device, or there are no running statistics although not training.
        TypeError: The residual has another dtype or is not strided, or an argument has the wrong type.

        A call that raises has changed nothing.

    Source: Ioffe and Szegedy 2015, Batch Normalization, algorithm 1.
    """
    if activation not in CEILINGS:
        raise ValueError(
            f"batch_norm: activation: expected 'relu', 'relu6' or None, got {activation!r}"
        )
    if not eps > 0 and (training or not eps >= 0):
        least = "positive" if training else "not negative"
        raise ValueError(f"batch_norm: eps: expected a number that is {least}, got {eps}")
    if residual is not None:
        _check_residual(residual, input)
    ceiling = CEILINGS[activation]
    options = Options(
        running_mean, running_var, num_batches_tracked, training, momentum, eps, ceiling
    )
    group = process_group if training else None
    traced = _is_traced(input)
    try:
        if _kernels_take(input, weight, bias, options, traced, group):
            if residual is not None and residual.dtype != input.dtype:
                return _promoted(input, residual, weight, bias, options, group)
            if training:
                _check_training(input, options, group)
            input = gradient.dense(input)
            if residual is not None:
                residual = gradient.as_dense_as(residual, input)
            if group is not None:
                return synchronized_batch_norm(input, residual, weight, bias, options, group)
            if traced:
                return operators.batch_norm(input, residual, weight, bias, options)
            if torch.is_grad_enabled() and (
                input.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            ):
                return gradient.apply(input, residual, weight, bias, options)
            return gradient.BatchNorm.forward(None, input, residual, weight, bias, options)
    except (AttributeError, TypeError):
        # The kernels check everything before they change anything, so the slower check is only for what they refuse.
        if traced or _fits(_PLAIN, input, weight, bias, options):
            raise
    if group is not None:
        raise TypeError(
            "batch_norm: process_group: expected tensors that the kernels take, got an input of "
            f"{type(input).__name__} or parameters that they do not"
            if not _is_recorded()
            else "batch_norm: process_group: expected None where a module is exported or traced in training, got a "
            "group: call model.eval() first"
        )
    return _of_torch(input, residual, weight, bias, options)


def _is_traced(input: Tensor) -> bool:
    """Returns whether a tracer records operations instead of running them, or a mode of torch's intercepts them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(input) is FakeTensor
    )


def _kernels_take(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    traced: bool,
    group: ProcessGroup | None,
) -> bool:
    """Decides between the kernels and torch's operation.

    Most eager calls pass a quick check, and the kernels check the rest.
    """
    # A tracer can follow only these two conditions, so the ones for eager calls come after them.
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_exporting() or transformed or not _ON_CPU:
        return False  # exported code runs without this package
    if traced:
        fits = _fits(_TRACED, input, weight, bias, options)
    else:
        fits = not _has_tangents_or_trace() and (
            _seems_to_fit(input, weight, bias, options)
            or _fits(_PLAIN, input, weight, bias, options)
        )
    return fits and (input.numel() > 0 or group is not None)


def _check_training(input: Tensor, options: Options, group: ProcessGroup | None) -> None:
    if options.momentum is None:
        _check_counted(options)
    if group is None and input.numel() == input.shape[1]:
        raise ValueError(
            "batch_norm: input: expected more than 1 value per channel when training, got input size "
            f"{input.shape}"
        )


def _check_residual(residual: Tensor, input: Tensor) -> None:
    """Refuses a residual that would need broadcasting, promotion or a copy between devices."""
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"batch_norm: residual: expected a torch.Tensor or None, got {type(residual).__name__}"
        )
    if residual.shape != input.shape:
        raise RuntimeError(
            f"batch_norm: residual: expected the input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    if residual.device != input.device:
        raise RuntimeError(
            f"batch_norm: residual: expected the input's device {input.device}, got {residual.device}"
        )
    if residual.layout != torch.strided:
        raise TypeError(f"batch_norm: residual: expected a strided tensor, got {residual.layout}")
    if residual.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise TypeError(
            f"batch_norm: residual: expected the input's dtype {input.dtype}, got {residual.dtype}"
        )


def _check_counted(options: Options) -> None:
    if options.running_mean is not None and options.num_batches_tracked is None:
        raise TypeError(
            "batch_norm: momentum: expected a number where no batches are counted, got None"
        )


def _has_tangents_or_trace() -> bool:
    """Returns whether forward-mode derivatives or ``jit.trace`` are active, so that tensors are more than memory."""
    return forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None


def _is_recorded() -> bool:
    """Returns whether operations are exported, so that only torch's own operation may appear."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def _seems_to_fit(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options
) -> bool:
    """Returns whether types and dtypes fit, a quick check that most calls pass; the kernels check the rest."""
    if type(input) not in _PLAIN or input.layout is not torch.strided or input.dim() < 2:
        return False
    dtype = input.dtype
    dtypes = (dtype, torch.float32) if dtype in _HALF else (dtype,)
    running_mean, running_var, *_ = options
    if (weight is not None and weight.dtype not in dtypes) or (
        bias is not None and bias.dtype not in dtypes
    ):
        return False
    if running_mean is None or running_var is None:
        return running_mean is running_var
    return (
        running_mean.dtype in dtypes
        and running_var.dtype in dtypes
        and not running_mean.requires_grad
        and not running_var.requires_grad
    )


def _fits(
    kinds: tuple[type, ...],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> bool:
    """Returns whether the kernels take these arguments."""
    if type(input) not in kinds or input.layout != torch.strided or input.dim() < 2:
        return False
    dtype = input.dtype
    device = input.device
    if dtype not in _DTYPES or (device.type != "cpu" and not (_ON_CUDA and device.type == "cuda")):
        return False
    wider = torch.float32 if dtype in _HALF else dtype
    shape = (input.shape[1],)
    running_mean, running_var, num_batches_tracked, training, *_ = options
    for vector in (weight, bias, running_mean, running_var):
        if vector is not None and (
            type(vector) not in kinds
            or vector.shape != shape
            or vector.dtype not in (dtype, wider)
            or vector.device != device
            or not vector.is_contiguous()
        ):
            return False
    if running_mean is None or running_var is None:
        if not training or running_mean is not running_var:
            return False
    elif running_mean.requires_grad or running_var.requires_grad:
        return False
    return num_batches_tracked is None or (
        type(num_batches_tracked) in kinds
        and num_batches_tracked.dtype == torch.int64
        and num_batches_tracked.numel() == 1
        and num_batches_tracked.device == device
    )


def _of_torch(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """Normalizes with torch's operations, which also raise the errors for arguments that no batch norm takes."""
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm: input: expected a torch.Tensor, got {type(input).__name__}")
    if input.dim() < 2:
        raise RuntimeError(
            f"batch_norm: input: expected 2 dimensions or more, got the shape {tuple(input.shape)}"
        )
    channels = input.shape[1]
    running_mean, running_var, num_batches_tracked, training, momentum, eps, ceiling = options
    vectors = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, vector in vectors.items():
        if isinstance(vector, Tensor) and vector.numel() != channels and input.numel() > 0:
            raise RuntimeError(
                f"batch_norm: {name}: expected {channels} elements, one for each channel of the input, "
                f"got {vector.numel()}"
            )
    factor = momentum
    if factor is None:
        factor = 0.0
        if training and running_mean is not None:
            _check_counted(options)
            if num_batches_tracked is not None and input.numel() > 0:
                factor = 1 / (float(num_batches_tracked) + 1)
    updated: list[tuple[Tensor, Tensor]] = []
    if training and running_mean is not None and running_var is not None and not _is_recorded():
        # The statistics are updated in copies, since torch's backward pass saves the tensors that it is given.
        updated = [(running, running.clone()) for running in (running_mean, running_var)]
        (_, running_mean), (_, running_var) = updated
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    if updated:
        with torch.no_grad():
            finite = updated[0][1].isfinite() & updated[1][1].isfinite()
            for running, new in updated:
                running.copy_(torch.where(finite, new, running))
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if residual is not None:
        output = output + residual
    return _activated(output, ceiling)


def _activated(output: Tensor, ceiling: float | None) -> Tensor:
    if ceiling is None:
        return output
    return F.relu(output) if ceiling == math.inf else F.hardtanh(output, 0.0, ceiling)


def _promoted(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    group: ProcessGroup | None,
) -> Tensor:
    """Normalises, then adds a residual of another dtype, as autocast makes them; the sum has the wider dtype."""
    running_mean, running_var, num_batches_tracked, training, momentum, eps, ceiling = options
    output = batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        num_batches_tracked=num_batches_tracked,
        process_group=group,
    )
    output = output + residual
    return _activated(output, ceiling)
