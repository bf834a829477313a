"""Batch normalization as ``torch.library`` operators, for code that is traced: ``torch.compile``, fake tensors, modes.

The operators run the same kernels as eager calls. Running statistics have an operator of their own, because an operator
that changes its arguments has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import allocator
from steadygrad.nn.gradient import (
    Options,
    Saved,
    as_dense_as,
    backward,
    dense,
    differentiable_backward,
    new_statistics,
)
from steadygrad.nn.relu_mask import new_mask


def batch_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """Does what :class:`steadygrad.nn.gradient.BatchNorm` does, with operators that a tracer sees."""
    running_mean, running_var, num_batches_tracked, training, momentum, eps, ceiling = options
    keep_mask = ceiling is not None and residual is not None and torch.is_grad_enabled()
    output: Tensor
    if not training:
        assert running_mean is not None and running_var is not None
        output, _ = batch_norm_inference(
            input, residual, weight, bias, running_mean, running_var, eps, ceiling, keep_mask
        )
        return output
    output, _, statistics = batch_norm_training(
        input, residual, weight, bias, eps, ceiling, keep_mask
    )
    if running_mean is not None or num_batches_tracked is not None:
        batch_norm_track_(statistics, running_mean, running_var, num_batches_tracked, momentum)
    return output


def _or_empty(tensor: Tensor | None, input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return input.new_empty(0, dtype=dtype) if tensor is None else tensor


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() > 0 else None


@torch.library.custom_op("steadygrad::batch_norm_training", mutates_args=())
def batch_norm_training(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    ceiling: float | None,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns output, ReLU's mask (empty if it is not kept) and statistics: means, biased variances, count."""
    input = dense(input)
    if residual is not None:
        residual = as_dense_as(residual, input)
    output, statistics = torch.empty_like(input), new_statistics(input)
    mask = new_mask(input) if keep_mask else None
    running = (None, None, None, 0.0)
    made = (output, mask, statistics, allocator(input.device))
    _kernels.batch_norm_forward(input, residual, weight, bias, *running, eps, ceiling, *made)
    return output, _or_empty(mask, input, torch.uint8), statistics


@torch.library.custom_op("steadygrad::batch_norm_inference", mutates_args=())
def batch_norm_inference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    ceiling: float | None,
    keep_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Returns output and ReLU's mask (empty if it is not kept), with running statistics as constants."""
    input = dense(input)
    if residual is not None:
        residual = as_dense_as(residual, input)
    output, mask = torch.empty_like(input), new_mask(input) if keep_mask else None
    constants = (None, running_mean, running_var)
    _kernels.batch_norm_normalize(
        input, residual, weight, bias, *constants, eps, ceiling, output, mask
    )
    return output, _or_empty(mask, input, torch.uint8)


@torch.library.custom_op(
    "steadygrad::batch_norm_track_",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def batch_norm_track_(
    statistics: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Updates running statistics with those of a batch."""
    _kernels.batch_norm_combine(
        statistics.unsqueeze(0),
        torch.empty_like(statistics),
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
    )


@torch.library.custom_op("steadygrad::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    ceiling: float | None,
    bias_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of input, residual (with ReLU only), weight and bias; empty if they are not needed."""
    input = dense(input)
    constants = (statistics, running_mean, running_var)
    saved = Saved(input, mask, weight, bias, *constants, eps, ceiling)
    needed = [needed[0], needed[1] and ceiling is not None, needed[2], needed[3]]
    grads = backward(grad_output, saved, bias_dtype, needed)
    grad_input, grad_residual, grad_weight, grad_bias = (_or_empty(g, input) for g in grads)
    return grad_input, grad_residual, grad_weight, grad_bias


def _fake_mask(input: Tensor, keep_mask: bool) -> Tensor:
    return new_mask(input) if keep_mask else input.new_empty(0, dtype=torch.uint8)


@batch_norm_training.register_fake
def _(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    ceiling: float | None,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    statistics = input.new_empty(2 * input.shape[1] + 1, dtype=torch.float64)
    return torch.empty_like(input), _fake_mask(input, keep_mask), statistics


@batch_norm_inference.register_fake
def _(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    ceiling: float | None,
    keep_mask: bool,
) -> tuple[Tensor, Tensor]:
    input = dense(input)
    return torch.empty_like(input), _fake_mask(input, keep_mask)


@batch_norm_track_.register_fake
def _(
    statistics: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    return None


@batch_norm_backward.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    ceiling: float | None,
    bias_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input = dense(input)
    channels = input.shape[1]
    weight_dtype = None if weight is None else weight.dtype

    def vector(wanted: bool, dtype: torch.dtype | None) -> Tensor:
        return input.new_empty(channels if wanted and dtype is not None else 0, dtype=dtype)

    return (
        torch.empty_like(input) if needed[0] else input.new_empty(0),
        torch.empty_like(input) if needed[1] and ceiling is not None else input.new_empty(0),
        vector(needed[2], weight_dtype),
        vector(needed[3], bias_dtype),
    )


def _save(
    ctx: Any,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    statistics: Sequence[Tensor | None],
    eps: float,
    ceiling: float | None,
) -> None:
    """Keeps what the gradient needs; ``statistics`` are the batch's, the running mean and the running variance."""
    has_relu = ceiling is not None
    if has_relu and residual is not None and mask.numel() == 0 and any(ctx.needs_input_grad):
        raise RuntimeError(
            "batch_norm: keep_mask: expected True if a gradient is needed through ReLU after a residual, got False"
        )
    bias_dtype = None if bias is None else bias.dtype
    read_bias = bias if has_relu and residual is None else None
    ctx.save_for_backward(input, _or_none(mask), weight, read_bias, *statistics)
    ctx.arguments = (eps, ceiling, bias_dtype)


def _gradients(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    """Returns the gradients of input, residual, weight and bias, from what :func:`_save` kept."""
    eps, ceiling, bias_dtype = ctx.arguments
    saved = Saved._make((*ctx.saved_tensors, eps, ceiling))
    needed = list(ctx.needs_input_grad[:4])
    if torch.is_grad_enabled():
        saved = saved._replace(input=dense(saved.input))
        passed = None
        if ceiling is not None:
            with torch.no_grad():
                passed = _let_through(saved)
        return list(differentiable_backward(grad_output, saved, passed, bias_dtype, needed))
    grads = batch_norm_backward(grad_output, *saved, bias_dtype, needed)
    found = [grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)]
    if needed[1] and ceiling is None:
        found[1] = grad_output
    return found


def _let_through(saved: Saved) -> Tensor:
    """Returns the gradient of ones through ReLU: 1 where it let the gradient through, else 0."""
    input, mask, weight, bias, statistics, mean, var, eps, ceiling = saved
    if mask is None:
        if statistics is not None:
            mean, var = statistics[:-1].chunk(2)
        assert mean is not None and var is not None
        _, mask = batch_norm_inference(input, None, weight, bias, mean, var, eps, ceiling, True)
    needed = [False, True, False, False]
    saved = saved._replace(mask=mask)
    passed: Tensor = batch_norm_backward(torch.ones_like(input), *saved, None, needed)[1]
    return passed


def _save_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, residual, weight, bias, eps, ceiling, _ = inputs
    _, mask, statistics = output
    ctx.mark_non_differentiable(mask, statistics)
    _save(ctx, input, residual, weight, bias, mask, (statistics, None, None), eps, ceiling)


def _save_inference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, residual, weight, bias, running_mean, running_var, eps, ceiling, _ = inputs
    _, mask = output
    ctx.mark_non_differentiable(mask)
    _save(ctx, input, residual, weight, bias, mask, (None, running_mean, running_var), eps, ceiling)


def _training_gradients(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad_output), None, None, None


def _inference_gradients(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad_output), None, None, None, None, None


batch_norm_training.register_autograd(_training_gradients, setup_context=_save_training)
batch_norm_inference.register_autograd(_inference_gradients, setup_context=_save_inference)
