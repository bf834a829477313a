"""The functional form of batch normalization, and what becomes of calls that the kernels do not take."""

from __future__ import annotations

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
from steadygrad.reference.batch_norm import Activation as Activation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PLAIN = (Tensor, Parameter)
_TRACED = (Tensor, Parameter, FakeTensor, FunctionalTensor)
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
# A wheel without CUDA leaves CUDA tensors to torch; so does one for CUDA under a torch for ROCm.
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
    r"""Batch normalization, with a residual and ReLU in the same pass where they are wanted.

    .. math::

        y = \operatorname{activation}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \, w + b + \text{residual}\right)

    :math:`\mu` and :math:`\sigma^2` are the batch's mean and biased variance of each channel when training, else the
    running ones. They are found in float64, equally exact in every memory format. The output is dense: channels last
    where the input is (also in 3-D, where torch makes it contiguous), else contiguous. With ReLU no output is kept for
    backward; with ReLU and a residual, one bit an element is.

    What the kernels do not take goes to :func:`torch.nn.functional.batch_norm`: other devices than CPU and CUDA,
    subclasses of tensors, transforms of :mod:`torch.func`, forward-mode derivatives, empty batches. So does what is
    exported (:mod:`torch.export`, ONNX, ``torch.jit.trace``), so that files run without this package. Autocast leaves
    the dtype of the input alone, as it does for torch's.

    A channel of a batch whose mean or variance is not finite, or would not be as a running one, does not enter the
    running statistics. In torch one such batch makes them NaN or infinite for ever, although a stabilized optimizer
    skips its step. It counts in ``num_batches_tracked``, and so under ``momentum=None`` as one that equalled the
    average so far.

    In evaluation backward reads the running statistics. Where they have changed meanwhile, by a call in training, it
    raises autograd's ``RuntimeError`` ("modified by an inplace operation"); torch's gradient is wrong then.

    Args:
        input: (N, C) or (N, C, ...) in float32, float64, bfloat16 or float16; any strides.
        running_mean: (C), brought up to date in place when training; or None.
        running_var: as ``running_mean``; the unbiased variance goes in.
        weight: (C) or None for 1. Like ``bias`` and the running statistics of the input's dtype, or float32
            where the input is half precision.
        bias: (C) or None for 0.
        training: whether to normalise with the batch's statistics.
        momentum: weight of the batch in the running statistics; None for the average of all batches, which
            needs ``num_batches_tracked``.
        eps: added to the variance, positive; 0 is allowed where not training.
        residual: added before the activation; of the input's shape, dtype and device, any strides. Under autocast
            another dtype is promoted as in ``batch_norm(...) + residual``.
        activation: ``"relu"`` or None.
        num_batches_tracked: 0-d int64, goes up by one when training, without waiting for the device; or None.
        process_group: takes the statistics over all ranks when training,
            :func:`~steadygrad.nn.synchronized.synchronized_batch_norm` says how; None for this process alone.

    Returns:
        The output, as ``input`` in shape and dtype.

    Raises:
        ValueError: one value per channel when training, ``eps`` out of range, or an unknown activation.
        RuntimeError: another number of channels in an argument than in the input, an input of less than 2
            dimensions, a residual of another shape or device, or no running statistics where not training.
        TypeError: a residual of another dtype, or not strided, or an argument of another kind.

        A call that is refused changes nothing.

    Source: Ioffe and Szegedy 2015, Batch Normalization, algorithm 1.
    """
    relu = activation == "relu"
    if not relu and activation is not None:
        raise ValueError(f"batch_norm: activation: expected 'relu' or None, got {activation!r}")
    if not eps > 0 and (training or not eps >= 0):
        least = "positive" if training else "not negative"
        raise ValueError(f"batch_norm: eps: expected a number that is {least}, got {eps}")
    if residual is not None:
        _check_residual(residual, input)
    options = Options(running_mean, running_var, num_batches_tracked, training, momentum, eps, relu)
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
        # The kernels look at everything before they change anything: the long look is for what they refuse.
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
    """Whether operations are written down instead of carried out at once, or seen by a mode of torch's."""
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

    Eager calls get a short look, that most of them pass; the kernels see the rest for themselves.
    """
    # Transforms rewrite operations; the order counts: under a tracer no more is evaluated than the first two.
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_exporting() or transformed or not _ON_CPU:
        return False  # what is exported runs without this package
    if traced:
        fits = _fits(_TRACED, input, weight, bias, options)
    else:
        fits = not _has_tangents_or_trace() and (
            _is_uniform(input, weight, bias, options) or _fits(_PLAIN, input, weight, bias, options)
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
    """Refuses what cannot be added without broadcasting, promotion or a copy between devices."""
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
    """Whether tensors stand for more than their memory: under forward-mode derivatives and ``jit.trace``."""
    return forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None


def _is_recorded() -> bool:
    """Whether operations are written down for elsewhere, where torch's operation is to stand alone."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def _is_uniform(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options
) -> bool:
    """A short look that most calls pass: all of one dtype. The rest of :func:`_fits` the kernels see for themselves."""
    if type(input) not in _PLAIN or input.layout is not torch.strided or input.dim() < 2:
        return False
    dtype = input.dtype
    running_mean, running_var, *_ = options
    if (weight is not None and weight.dtype is not dtype) or (
        bias is not None and bias.dtype is not dtype
    ):
        return False
    if running_mean is None or running_var is None:
        return running_mean is running_var
    return (
        running_mean.dtype is dtype
        and running_var.dtype is dtype
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
    """Whether the kernels take these arguments."""
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
    """Normalizes by torch's operations, which also refuse what no batch norm can take."""
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm: input: expected a torch.Tensor, got {type(input).__name__}")
    if input.dim() < 2:
        raise RuntimeError(
            f"batch_norm: input: expected 2 dimensions or more, got the shape {tuple(input.shape)}"
        )
    channels = input.shape[1]
    running_mean, running_var, num_batches_tracked, training, momentum, eps, relu = options
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
        # In copies, since torch's backward saves what it is given.
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
    return F.relu(output) if relu else output


def _promoted(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    group: ProcessGroup | None,
) -> Tensor:
    """With a residual of another dtype, as autocast leaves them: the sum has the wider one."""
    running_mean, running_var, num_batches_tracked, training, momentum, eps, relu = options
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
    return F.relu(output) if relu else output
