"""Batch normalization on the kernels, forward and backward: eager autograd, and what the operators share with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import allocator
from steadygrad.nn.relu_mask import let_through, new_mask

# Of input, residual, weight and bias.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# running_mean, running_var, num_batches_tracked, training, momentum, eps, relu.
Options = tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None, float, bool]


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels are neighbours in memory and everything else is in order, with no gaps."""
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).is_contiguous()


def dense(input: Tensor) -> Tensor:
    """The tensor itself where it is contiguous or has channels last, else a contiguous copy."""
    if input.is_contiguous() or is_channels_last(input):
        return input
    return input.contiguous()


def as_dense_as(tensor: Tensor, input: Tensor) -> Tensor:
    """The tensor in the memory format of a dense input of its shape."""
    if input.is_contiguous():
        return tensor.contiguous()
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor itself where it has these strides, those of a dense tensor, else a copy that does."""
    if tensor.stride() == strides:
        return tensor
    placed = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return placed.copy_(tensor)


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: bool,
    keep_mask: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output; the mask of ReLU, where it is to be kept; and the statistics of the batch, when training."""
    output = torch.empty_like(input)
    mask = new_mask(input) if keep_mask else None
    if not training:
        _kernels.batch_norm_normalize(
            input, residual, weight, bias, None, running_mean, running_var, eps, relu, output, mask
        )
        return output, mask, None
    device = input.device
    statistics = torch.empty(2 * input.shape[1] + 1, dtype=torch.float64, device=device)
    _kernels.batch_norm_forward(
        input,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
        relu,
        output,
        mask,
        statistics,
        allocator(device),
    )
    return output, mask, statistics


def backward(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_dtype: torch.dtype | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
    needed: Sequence[bool],
) -> Gradients:
    """The gradients that are needed, by the kernels. ``bias`` itself is read only where ReLU kept no mask."""
    grad_output = with_strides(grad_output, input.stride())
    channels = input.shape[1]
    needs_residual = needed[1]
    grad_input = torch.empty_like(input) if needed[0] else None
    grad_residual = torch.empty_like(input) if needs_residual and relu else None
    grad_weight = grad_bias = None
    if needed[2] and weight is not None:
        grad_weight = weight.new_empty(channels)
    if needed[3] and bias_dtype is not None:
        if grad_weight is not None and bias_dtype is grad_weight.dtype:
            grad_bias = grad_weight.new_empty(channels)
        else:
            grad_bias = input.new_empty(channels, dtype=bias_dtype)
    if needed[0] or needed[2] or needed[3] or grad_residual is not None:
        _kernels.batch_norm_backward(
            grad_output,
            input,
            mask,
            weight,
            bias,
            statistics,
            running_mean,
            running_var,
            eps,
            relu,
            grad_input,
            grad_residual,
            grad_weight,
            grad_bias,
            allocator(input.device),
        )
    if needs_residual and not relu:
        grad_residual = grad_output
    return grad_input, grad_residual, grad_weight, grad_bias


def differentiable_backward(
    grad_output: Tensor,
    input: Tensor,
    passed: Tensor | None,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    needed: Sequence[bool],
) -> Gradients:
    r"""The same gradients as a formula of torch operations, for derivatives of any order.

    With :math:`g` the gradient where ``passed`` is not 0, :math:`\hat x = (x - \mu) / \sigma` and
    :math:`\langle\rangle` the mean over a channel:
    :math:`\nabla x = w / \sigma \, (g - \langle g \rangle - \hat x \langle g \hat x \rangle)`, where the last two
    terms are absent if the statistics are constants.
    """
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    reduced = [0, *range(2, input.dim())]
    shape = (1, -1) + (1,) * (input.dim() - 2)
    grad = grad_output.to(wide)
    if passed is not None:
        grad = grad.masked_fill(passed == 0, 0)
    if statistics is not None:
        # Constants have no gradient: the mean is subtracted once in advance, so that nothing cancels.
        channels = input.shape[1]
        near = input.to(wide) - statistics[:channels].to(wide).view(shape)
        deviation = near - near.mean(reduced, keepdim=True)
        var = deviation.square().mean(reduced, keepdim=True)
    else:
        assert running_mean is not None and running_var is not None
        deviation = input.to(wide) - running_mean.to(wide).view(shape)
        var = running_var.to(wide).view(shape)
    inverse = (var + eps).rsqrt()
    normalized = deviation * inverse
    grad_input = grad_residual = grad_weight = grad_bias = None
    if needed[0]:
        own = grad
        if statistics is not None:
            products = (grad * normalized).mean(reduced, keepdim=True)
            own = grad - grad.mean(reduced, keepdim=True) - normalized * products
        scale = inverse if weight is None else inverse * weight.to(wide).view(shape)
        grad_input = (own * scale).to(input.dtype)
    if needed[1]:
        grad_residual = grad.to(input.dtype)
    if needed[2] and weight is not None:
        grad_weight = (grad * normalized).sum(reduced).to(weight.dtype)
    if needed[3] and bias_dtype is not None:
        grad_bias = grad.sum(reduced).to(bias_dtype)
    return grad_input, grad_residual, grad_weight, grad_bias


class BatchNorm(torch.autograd.Function):
    """Batch normalization for eager autograd; :mod:`steadygrad.nn.operators` has it for compiled code."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        options: Options,
    ) -> Tensor:
        """The output; keeps the input, and no more of its size."""
        running_mean, running_var, _, training, _, eps, relu = options
        keep_mask = relu and residual is not None
        output, mask, statistics = forward(input, residual, weight, bias, *options, keep_mask)
        # What tells backward where ReLU let through: its mask, or else the bias, to find it again.
        known = mask if keep_mask else bias if relu else None
        if training:
            # Not the running statistics: the next batch changes them, and these gradients do not depend on them.
            ctx.save_for_backward(input, weight, known, statistics)
        else:
            ctx.save_for_backward(input, weight, known, running_mean, running_var)
        bias_dtype = None if bias is None else bias.dtype
        ctx.arguments = (training, eps, relu, keep_mask, bias_dtype, input.stride())
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the first four arguments."""
        training, eps, relu, keep_mask, bias_dtype, strides = ctx.arguments
        statistics = running_mean = running_var = None
        if training:
            input, weight, known, statistics = ctx.saved_tensors
        else:
            input, weight, known, running_mean, running_var = ctx.saved_tensors
        mask, bias = (known, None) if keep_mask else (None, known)
        # Hooks on saved tensors may bring them back in another memory format, which the mask does not have.
        input = with_strides(input, strides)
        constants = (statistics, running_mean, running_var)
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or not _is_single(grad_output):
            passed = None
            if relu:
                with torch.no_grad():
                    passed = let_through(input, mask, weight, bias, *constants, eps)
            grads = differentiable_backward(
                grad_output, input, passed, weight, bias_dtype, *constants, eps, needed
            )
        else:
            grads = backward(
                grad_output, input, mask, weight, bias, bias_dtype, *constants, eps, relu, needed
            )
        return *grads, None


# Past what torch.autograd.Function.apply does for torch.func, which costs 2 us; callers have seen to it that no
# transform is active.
apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNorm).apply


def _is_single(tensor: Tensor) -> bool:
    """Not where it stands for a batch of gradients, as under ``is_grads_batched``."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
