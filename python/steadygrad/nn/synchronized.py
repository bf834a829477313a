"""Batch normalization with the statistics of a whole process group: one gather forward, one reduction backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from steadygrad import _kernels
from steadygrad.memory import allocator, is_asynchronous
from steadygrad.nn.gradient import Gradients, new_mask, unpacked

# Weight, bias, running_mean, running_var, num_batches_tracked.
Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# What a rank tells the others about its graph, beside its statistics.
_FOLLOWS = 0.0  # nothing here requires a gradient
_RECORDS = 1.0  # something does: this rank's backward reduces over all ranks
_ABSENT = 2.0  # gradients are off: this rank will not run backward


@dataclass(frozen=True)
class _Call:
    eps: float
    relu: bool
    group: dist.ProcessGroup
    recorded: bool  # whether backward may come
    absent: tuple[int, ...]  # ranks known not to run backward


def synchronized_batch_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    relu: bool,
    process_group: dist.ProcessGroup,
) -> Tensor:
    r"""Training batch normalization over the elements of all ranks of ``process_group``.

    Every rank sends its means, biased variances and count in float64 and combines all of them by the formula of
    Chan et al., in the order of the ranks, so that all get the same bits. Ranks may have any number of elements,
    also none: an empty rank takes part in the same collectives. Backward reduces
    :math:`\sum g` and :math:`\sum g (x - \mu)` in float64; double backward reduces once more. The gradients of
    ``weight`` and ``bias`` are those of this rank, for ``DistributedDataParallel`` to average.

    The output requires a gradient where anything does on any rank: the losses of all ranks depend on every input.
    So backward has to run on all ranks or on none; and all have to be in the same mode of training, and with
    gradients on or off alike. Where one does not come, the others wait for the group's timeout. On a CUDA device
    the host waits only on ranks where nothing requires a gradient although gradients are on: these ask the others.

    Under ``torch.compile`` this is a graph break; it runs eagerly.

    Args:
        input: (N, C, ...), contiguous or with channels last, or empty.
        residual: as ``input``, added before ReLU; or None.
        weight: (C) or None.
        bias: (C) or None.
        running_mean: (C), updated in place, or None.
        running_var: (C), updated in place, or None.
        num_batches_tracked: 0-d int64, goes up by one, or None.
        momentum: weight of the new statistics in the running ones; None for the average of all batches.
        eps: added to the variance.
        relu: whether ReLU follows.
        process_group: the ranks; ``torch.distributed.group.WORLD`` for all.

    Returns:
        The output, as ``input`` in shape, dtype and strides.

    Raises:
        TypeError: ``process_group`` is not a ``ProcessGroup``.
        RuntimeError: ``process_group`` was destroyed or never initialised, or this rank is not one of its members;
            in backward, when a rank on the CPU ran forward without gradients.
        ValueError: on the CPU, when all ranks together have one value per channel. On a CUDA device, where the host
            does not know, the variance is then 0.
    """
    vectors = (weight, bias, running_mean, running_var, num_batches_tracked)
    arguments = (input, residual, vectors, momentum, eps, relu, process_group)
    if torch.compiler.is_compiling():
        eagerly: Callable[..., Tensor] = torch.compiler.disable(_synchronized)
        return eagerly(*arguments)
    return _synchronized(*arguments)


def _synchronized(
    input: Tensor,
    residual: Tensor | None,
    vectors: Vectors,
    momentum: float | None,
    eps: float,
    relu: bool,
    process_group: dist.ProcessGroup,
) -> Tensor:
    check_process_group(process_group)
    weight, bias = vectors[:2]
    if process_group.size() == 1 and input.numel() > 0:
        return _alone(input, residual, vectors, momentum, eps, relu)
    graph = _ABSENT
    if torch.is_grad_enabled():
        wanted = any(t is not None and t.requires_grad for t in (input, residual, weight, bias))
        graph = _RECORDS if wanted else _FOLLOWS
    gathered = _gathered_statistics(input, graph, process_group)
    statistics = gathered.new_empty(2 * input.shape[1] + 1)
    total = None  # elements of a channel, where the host can know
    absent: tuple[int, ...] = ()
    if is_asynchronous(input.device):
        follows = graph == _FOLLOWS and _any_records(gathered)
    else:
        counts, graphs = gathered[:, -2:].T.tolist()
        total = sum(counts)
        if total == 1:
            raise ValueError(
                "batch_norm: input: expected more than 1 value per channel when training, "
                f"got 1 on the {len(counts)} ranks of process_group together"
            )
        absent = tuple(rank for rank, state in enumerate(graphs) if state == _ABSENT)
        follows = graph == _FOLLOWS and _RECORDS in graphs
    if total != 0:
        parts = gathered[:, :-1].contiguous()
        _kernels.batch_norm_combine(parts, statistics, *vectors[2:], momentum)
    else:
        statistics.zero_()
        if vectors[4] is not None:
            vectors[4].add_(1)
    anchor = _anchor() if follows else None
    call = _Call(eps, relu, process_group, follows or graph == _RECORDS, absent)
    return _normalize(input, residual, weight, bias, anchor, statistics, call)


def _alone(
    input: Tensor,
    residual: Tensor | None,
    vectors: Vectors,
    momentum: float | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """What a process without a group does."""
    from steadygrad.nn.functional import batch_norm  # it imports this module

    weight, bias, running_mean, running_var, num_batches_tracked = vectors
    return batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        True,
        momentum,
        eps,
        residual=residual,
        activation="relu" if relu else None,
        num_batches_tracked=num_batches_tracked,
    )


def check_process_group(process_group: Any) -> None:
    """Refuses what collectives cannot run over on this rank.

    Raises:
        TypeError: it is not a ``torch.distributed.ProcessGroup``.
        RuntimeError: it was destroyed or never initialised, or this rank is not a member.
    """
    if not dist.is_available():
        raise RuntimeError(
            "batch_norm: process_group: this torch was built without torch.distributed"
        )
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(
            "batch_norm: process_group: expected a group that this rank is a member of"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "batch_norm: process_group: expected a torch.distributed.ProcessGroup, "
            f"got {type(process_group).__name__}"
        )
    try:
        if dist.is_initialized():
            dist.get_backend(process_group)
            return
    except ValueError:
        pass
    raise RuntimeError(
        "batch_norm: process_group: expected an initialized group, got one that was destroyed "
        "or belongs to an earlier init_process_group"
    )


def _anchor() -> Tensor:
    """An input that makes autograd record a call in which nothing else requires a gradient."""
    return torch.empty(0, requires_grad=True, device="cpu")


def _any_records(gathered: Tensor) -> bool:
    """Whether any rank records a graph; waits for the device. A capture cannot wait, and assumes it."""
    if gathered.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return bool((gathered[:, -1] == _RECORDS).any())


def _gathered_statistics(input: Tensor, graph: float, group: dist.ProcessGroup) -> Tensor:
    """The ranks' vectors of statistics and what each said of its graph, (ranks, 2 * channels + 2)."""
    size = 2 * input.shape[1] + 2
    record = torch.full((size,), graph, dtype=torch.float64, device=input.device)
    if input.numel() > 0:
        _kernels.batch_norm_statistics(input, record[:-1], allocator(input.device))
    else:
        record[:-1] = 0
    ranks = group.size()
    gathered = record.new_empty(ranks * size)
    # torch 2.13 renamed it, and warns of the old name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, record, group=group)
    return gathered.view(ranks, size)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        statistics: Tensor,
        call: _Call,
    ) -> Tensor:
        output = torch.empty_like(input)
        mask = None
        if input.numel() > 0:
            if call.relu and residual is not None and call.recorded:
                mask = new_mask(input)
            affine = (residual, weight, bias)
            _kernels.batch_norm_normalize(
                input, *affine, statistics, None, None, call.eps, call.relu, output, mask
            )
        # Without a mask, ReLU is decided once more; else bias is free to change before backward.
        read_bias = bias if call.relu and mask is None else None
        ctx.save_for_backward(input, weight, read_bias, statistics, mask)
        ctx.call, ctx.strides = call, input.stride()
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        if call.absent:
            raise RuntimeError(
                "batch_norm: backward: expected all ranks of process_group to take part, "
                f"but ranks {list(call.absent)} ran forward with gradients off"
            )
        input, *saved = ctx.saved_tensors
        if (
            input.stride() != ctx.strides
        ):  # hooks on saved tensors may bring it back in another layout
            strided = torch.empty_strided(
                input.shape, ctx.strides, dtype=input.dtype, device=input.device
            )
            input = strided.copy_(input)
        needed = ctx.needs_input_grad[:4]
        arguments = (grad_output, input, *saved, call, ctx.bias_dtype, needed)
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(_anchor(), *arguments)
        else:
            grads, _ = _gradients(*arguments)
        return *grads, None, None, None


_normalize: Callable[..., Tensor] = _Normalize.apply


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    call: _Call,
    bias_dtype: torch.dtype | None,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Gradients, Tensor]:
    """Gradients of input, residual, weight and bias where needed, and the sums over all ranks."""
    channels = input.shape[1]
    if grad_output.stride() != input.stride():
        grad_output = torch.empty_like(input).copy_(grad_output)
    common = (grad_output, input, mask, weight, bias, statistics)
    sums = statistics.new_empty(2 * channels)
    if input.numel() == 0:
        sums.zero_()
    else:
        _kernels.batch_norm_backward_sums(
            *common, call.eps, call.relu, sums, allocator(input.device)
        )
    grad_input = torch.empty_like(input) if needed[0] else None
    grad_residual = grad_weight = grad_bias = None
    if needed[1]:
        grad_residual = torch.empty_like(input) if call.relu else grad_output
    # Always, whatever is needed here: the others' input gradients need this rank's sums.
    total, reduction = _start_sum(sums, call.group)
    if needed[2] and weight is not None:
        inverse = torch.rsqrt(statistics[channels:-1] + call.eps)
        grad_weight = (sums[channels:] * inverse).to(weight.dtype)
    if needed[3] and bias_dtype is not None:
        grad_bias = sums[:channels].to(bias_dtype)
    if reduction is not None:
        reduction.wait()
    masked = grad_residual if call.relu else None
    if input.numel() > 0 and (grad_input is not None or masked is not None):
        _kernels.batch_norm_backward_input(*common, total, call.eps, call.relu, grad_input, masked)
    return (grad_input, grad_residual, grad_weight, grad_bias), total


def _start_sum(local: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work | None]:
    """Where the sum over all ranks will be, and what to wait for."""
    total = local.clone()
    return total, dist.all_reduce(total, group=group, async_op=True)


class _Gradient(torch.autograd.Function):
    """The gradients as a function of grad_output, input and weight, differentiable once more."""

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
        call: _Call,
        bias_dtype: torch.dtype | None,
        needed: tuple[bool, bool, bool, bool],
    ) -> Gradients:
        saved = (grad_output, input, weight, bias, statistics, mask)
        grads, sums = _gradients(*saved, call, bias_dtype, needed)
        ctx.save_for_backward(*saved, sums)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_second_gradients(ctx.call, grads, *ctx.saved_tensors), *[None] * 6


_differentiable_gradients: Callable[..., Gradients] = _Gradient.apply


def _second_gradients(
    call: _Call,
    grads: tuple[Tensor | None, ...],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients with respect to grad_output, input and weight, from those of what `_gradients` returned.

    Plain torch in float64, as this is rare. ``h`` is input's gradient's gradient times weight, ``u`` is weight's
    gradient's gradient times ``g``, ``d`` is ``input - mean``.
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

    let_through = _let_through(call, input, weight, bias, statistics, mask)
    n = statistics[-1]
    inverse = torch.rsqrt(of_channel(statistics[channels:-1]) + call.eps)
    g = grad_output.double() * let_through
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
        """The first backward without weight, which is its own adjoint."""
        return inverse * (v - v_sum / n - d * (inverse**2 * vd_sum / n))

    along = h_sum * g_sum / n - hg_sum + 3 * inverse**2 * gd_sum * hd_sum / n
    across = hd_sum * (g_sum / n - g) + gd_sum * (h_sum / n - h)
    grad_input = inverse**3 / n * (d * along + across) + unscaled(u, u_sum, ud_sum)
    grad_grad = unscaled(h, h_sum, hd_sum) + of_channel(to_weight) * inverse * d
    grad_grad = (grad_grad + of_channel(to_bias) + wide(to_residual)) * let_through
    grad_weight = None
    if weight is not None:
        grad_weight = summed(wide(to_input) * unscaled(g, g_sum, gd_sum)).to(weight.dtype)
    return grad_grad.to(input.dtype), grad_input.to(input.dtype), grad_weight


def _let_through(
    call: _Call,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """1 where ReLU let the gradient through, else 0, in float64."""
    if not call.relu or input.numel() == 0:
        return torch.ones_like(input, dtype=torch.float64)
    if mask is None:  # once more, by the arithmetic that decided it
        mask = new_mask(input)
        affine = (None, weight, bias)
        _kernels.batch_norm_normalize(
            input, *affine, statistics, None, None, call.eps, True, torch.empty_like(input), mask
        )
    return unpacked(mask, input).double()
