"""Batch normalization on the kernels for eager autograd, forward and backward, and what the operators share with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import allocator
from steadygrad.nn.relu_mask import new_mask, unpacked

# The gradients of input, residual, weight and bias.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """The arguments of a forward pass beside its input, residual, weight and bias.

    The output is ``min(max(y, 0), ceiling)``: ReLU if ``ceiling`` is infinite, ReLU6 if it is 6, and ``y`` itself if it
    is None. Comments say ReLU of both.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    ceiling: float | None


class Saved(NamedTuple):
    """What the backward pass needs of a forward pass, in the order in which the kernels and the operators take it.

    The bias is needed only if ReLU kept no mask. ``statistics`` are those of the batch, shape (2 C + 1), or None if the
    running ones were used as constants.
    """

    input: Tensor
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    ceiling: float | None


def is_channels_last(tensor: Tensor) -> bool:
    """Returns whether the channels are the innermost dimension in memory, without gaps and with the others in order."""
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).is_contiguous()


def dense(input: Tensor) -> Tensor:
    """Returns the tensor itself if it is contiguous or has channels last, else a contiguous copy."""
    if input.is_contiguous() or is_channels_last(input):
        return input
    return input.contiguous()


def as_dense_as(tensor: Tensor, input: Tensor) -> Tensor:
    """Returns the tensor in the memory format of a dense input of the same shape."""
    if input.is_contiguous():
        return tensor.contiguous()
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Returns the tensor itself if it has these strides, which are those of a dense tensor, else a copy with them."""
    if tensor.stride() == strides:
        return tensor
    placed = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return placed.copy_(tensor)


def backward(
    grad_output: Tensor, saved: Saved, bias_dtype: torch.dtype | None, needed: Sequence[bool]
) -> Gradients:
    """Computes the needed gradients with the kernels."""
    input, _, weight, *_, ceiling = saved
    grad_output = with_strides(grad_output, input.stride())
    channels = input.shape[1]
    needs_residual = needed[1]
    grad_input = torch.empty_like(input) if needed[0] else None
    grad_residual = torch.empty_like(input) if needs_residual and ceiling is not None else None
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
            *saved,
            grad_input,
            grad_residual,
            grad_weight,
            grad_bias,
            allocator(input.device),
        )
    if needs_residual and ceiling is None:
        grad_residual = grad_output
    return grad_input, grad_residual, grad_weight, grad_bias


def differentiable_backward(
    grad_output: Tensor,
    saved: Saved,
    passed: Tensor | None,
    bias_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> Gradients:
    r"""Computes the same gradients with torch operations, for derivatives of any order.

    With :math:`g` the gradient where ``passed`` is not 0, :math:`\hat x = (x - \mu) / \sigma` and
    :math:`\langle\rangle` the mean over a channel:
    :math:`\nabla x = w / \sigma \, (g - \langle g \rangle - \hat x \langle g \hat x \rangle)`, where the last two
    terms are absent if the statistics are constants.
    """
    input, _, weight, _, statistics, running_mean, running_var, eps, _ = saved
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    reduced = [0, *range(2, input.dim())]
    shape = (1, -1) + (1,) * (input.dim() - 2)
    grad = grad_output.to(wide)
    if passed is not None:
        grad = grad.masked_fill(passed == 0, 0)
    if statistics is not None:
        # The constant means are subtracted first, so that nothing cancels; as constants they have no gradient.
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


def let_through(saved: Saved) -> Tensor:
    """Returns where ReLU let the gradient through, by the kernels' own arithmetic, so that every element agrees."""
    input, mask, weight, bias, statistics, running_mean, running_var, eps, ceiling = saved
    if mask is None:
        mask = new_mask(input)
        output = torch.empty_like(input)
        constants = (statistics, running_mean, running_var)
        _kernels.batch_norm_normalize(
            input, None, weight, bias, *constants, eps, ceiling, output, mask
        )
    return unpacked(mask, input)


def new_statistics(input: Tensor) -> Tensor:
    """Allocates memory for the means, the biased variances and the number of elements of a channel."""
    return torch.empty(2 * input.shape[1] + 1, dtype=torch.float64, device=input.device)


class BatchNorm(torch.autograd.Function):
    """Batch normalization for eager autograd; :mod:`steadygrad.nn.operators` is the form for compiled code."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        options: Options,
    ) -> Tensor:
        """Returns the output, keeping the input and nothing else of its size; ``ctx`` is None if gradients are off."""
        running_mean, running_var, num_batches_tracked, training, momentum, eps, ceiling = options
        output = torch.empty_like(input)
        keep_mask = ctx is not None and ceiling is not None and residual is not None
        mask = new_mask(input) if keep_mask else None
        statistics = None
        if training:
            statistics = new_statistics(input)
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
                ceiling,
                output,
                mask,
                statistics,
                allocator(input.device),
            )
            # These are not saved: the next batch changes them, and the gradients do not depend on them.
            running_mean = running_var = None
        else:
            constants = (None, running_mean, running_var)
            _kernels.batch_norm_normalize(
                input, residual, weight, bias, *constants, eps, ceiling, output, mask
            )
        if ctx is not None:
            # Without a mask the backward pass computes again what ReLU let through. With one it does not read the bias,
            # which may then change in between.
            read_bias = bias if ceiling is not None and not keep_mask else None
            ctx.save_for_backward(
                input, mask, weight, read_bias, statistics, running_mean, running_var
            )
            ctx.arguments = (eps, ceiling, None if bias is None else bias.dtype, input.stride())
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the first four arguments."""
        input, *others = ctx.saved_tensors
        eps, ceiling, bias_dtype, strides = ctx.arguments
        # Hooks on saved tensors may return the input in another memory format, which would not match the mask.
        saved = Saved._make((with_strides(input, strides), *others, eps, ceiling))
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or not _is_single(grad_output):
            passed = None
            if ceiling is not None:
                with torch.no_grad():
                    passed = let_through(saved)
            grads = differentiable_backward(grad_output, saved, passed, bias_dtype, needed)
        else:
            grads = backward(grad_output, saved, bias_dtype, needed)
        return *grads, None


# This skips what torch.autograd.Function.apply does for torch.func, which takes 2 us. Callers have checked that no
# transform is active.
apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNorm).apply


def _is_single(tensor: Tensor) -> bool:
    """Returns whether the tensor is a single gradient, and not a batch of them as under ``is_grads_batched``."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
