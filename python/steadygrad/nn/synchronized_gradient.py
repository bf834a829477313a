"""The gradients of synchronised batch normalization, which can be differentiated once more; each takes a reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from steadygrad import _kernels
from steadygrad.memory import allocator
from steadygrad.nn.gradient import Gradients, Saved, let_through, with_strides


@dataclass(frozen=True)
class Call:
    """What the backward pass needs to know about its forward pass."""

    eps: float
    ceiling: float | None
    group: dist.ProcessGroup
    recorded: bool  # whether there may be a backward pass
    absent: tuple[int, ...]  # ranks known not to run a backward pass


def anchor() -> Tensor:
    """Returns an input that makes autograd record a call in which nothing else requires a gradient."""
    return torch.empty(0, requires_grad=True, device="cpu")


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    call: Call,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Gradients, Tensor]:
    """Computes the needed gradients of input, residual, weight and bias, and the sums over all ranks."""
    channels = input.shape[1]
    grad_output = with_strides(grad_output, input.stride())
    common = (grad_output, input, mask, weight, bias, statistics)
    sums = statistics.new_empty(2 * channels)
    if input.numel() == 0:
        sums.zero_()
    else:
        _kernels.batch_norm_backward_sums(
            *common, call.eps, call.ceiling, sums, allocator(input.device)
        )
    grad_input = torch.empty_like(input) if needed[0] else None
    grad_residual = grad_weight = grad_bias = None
    if needed[1]:
        grad_residual = torch.empty_like(input) if call.ceiling is not None else grad_output
    # The sum is always computed, whatever is needed here, since other ranks need this rank's sums.
    total, reduction = _start_sum(sums, call.group)
    if needed[2] and weight is not None:
        inverse = torch.rsqrt(statistics[channels:-1] + call.eps)
        grad_weight = (sums[channels:] * inverse).to(weight.dtype)
    if needed[3] and bias_dtype is not None:
        grad_bias = sums[:channels].to(bias_dtype)
    if reduction is not None:
        reduction.wait()
    masked = grad_residual if call.ceiling is not None else None
    if input.numel() > 0 and (grad_input is not None or masked is not None):
        _kernels.batch_norm_backward_input(
            *common, total, call.eps, call.ceiling, grad_input, masked
        )
    return (grad_input, grad_residual, grad_weight, grad_bias), total


def _start_sum(local: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work | None]:
    """Starts the sum over all ranks, and returns the tensor that will hold it and the work to wait for."""
    total = local.clone()
    return total, dist.all_reduce(total, group=group, async_op=True)


class _Gradient(torch.autograd.Function):
    """Computes the gradients as a function of grad_output, input and weight that can be differentiated once more."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,  # every rank records this call, and joins the reduction of its backward
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        mask: Tensor | None,
        call: Call,
        bias_dtype: torch.dtype | None,
        needed: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        saved = (grad_output, input, weight, bias, statistics, mask)
        grads, sums = gradients(*saved, call, bias_dtype, needed)
        ctx.save_for_backward(*saved, sums)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_second_gradients(ctx.call, grads, *ctx.saved_tensors), *[None] * 6


differentiable_gradients: Callable[..., Gradients] = _Gradient.apply


def _second_gradients(
    call: Call,
    grads: tuple[Tensor | None, ...],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients with respect to grad_output, input and weight, from those of the outputs of `gradients`.

    The arithmetic is plain torch in float64, as second derivatives are rare. ``h`` is the gradient with respect to
    input's gradient times weight, ``u`` is the one with respect to weight's gradient times ``g``, and ``d`` is
    ``input - mean``.
    """
    to_input, to_residual, to_weight, to_bias = grads
    channels = input.shape[1]
    shape = (1, channels, *[1] * (input.dim() - 2))

    def wide(tensor: Tensor | None) -> Tensor:
        return torch.zeros_like(input, dtype=torch.float64) if tensor is None else tensor.double()

    def of_channel(vector: Tensor | None, absent: float = 0) -> Tensor:
        if vector is None:
            return statistics.new_full(shape, absent)
        return vector.double().view(shape)

    def summed(tensor: Tensor) -> Tensor:
        return tensor.sum([0, *range(2, input.dim())])

    passed = torch.ones_like(input, dtype=torch.float64)
    if call.ceiling is not None and input.numel() > 0:
        saved = Saved(input, mask, weight, bias, statistics, None, None, call.eps, call.ceiling)
        passed = let_through(saved).double()
    n = statistics[-1]
    inverse = torch.rsqrt(of_channel(statistics[channels:-1]) + call.eps)
    g = grad_output.double() * passed
    d = input.double() - of_channel(statistics[:channels])
    h = wide(to_input) * of_channel(weight, 1)
    u = g * of_channel(to_weight)
    total, reduction = _start_sum(
        torch.cat([summed(t) for t in (h, h * d, u, u * d, h * g)]), call.group
    )
    if reduction is not None:
        reduction.wait()
    h_sum, hd_sum, u_sum, ud_sum, hg_sum = (t.view(shape) for t in total.chunk(5))
    g_sum, gd_sum = (t.view(shape) for t in sums.chunk(2))

    def unscaled(v: Tensor, v_sum: Tensor, vd_sum: Tensor) -> Tensor:
        """Applies the first backward pass without weight, a linear map that is its own adjoint."""
        return inverse * (v - v_sum / n - d * (inverse**2 * vd_sum / n))

    along = h_sum * g_sum / n - hg_sum + 3 * inverse**2 * gd_sum * hd_sum / n
    across = hd_sum * (g_sum / n - g) + gd_sum * (h_sum / n - h)
    grad_input = inverse**3 / n * (d * along + across) + unscaled(u, u_sum, ud_sum)
    grad_grad = unscaled(h, h_sum, hd_sum) + of_channel(to_weight) * inverse * d
    grad_grad = (grad_grad + of_channel(to_bias) + wide(to_residual)) * passed
    grad_weight = None
    if weight is not None:
        grad_weight = summed(wide(to_input) * unscaled(g, g_sum, gd_sum)).to(weight.dtype)
    return grad_grad.to(input.dtype), grad_input.to(input.dtype), grad_weight
