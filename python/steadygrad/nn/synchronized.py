"""Batch normalization with the statistics of a whole process group: a gather forward, a reduction backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steadygrad import _kernels
from steadygrad.distributed.groups import check_process_group
from steadygrad.memory import allocator, is_asynchronous
from steadygrad.nn.gradient import Options, with_strides
from steadygrad.nn.relu_mask import new_mask
from steadygrad.nn.synchronized_gradient import Call, anchor, differentiable_gradients, gradients
from steadygrad.reference.batch_norm import CEILINGS

# Beside its statistics, a rank tells the others one of these about its graph.
_FOLLOWS = 0.0  # nothing on this rank requires a gradient
_RECORDS = 1.0  # something requires a gradient, so this rank's backward pass reduces over all ranks
_ABSENT = 2.0  # gradients are disabled, so this rank will not run a backward pass


def synchronized_batch_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    process_group: dist.ProcessGroup,
) -> Tensor:
    r"""Normalises in training with the statistics of the elements of all ranks of ``process_group``.

    Every rank sends its means, biased variances and count in float64, and combines those of all ranks by the formula of
    Chan et al. in the order of the ranks, so that all get the same bits. Ranks may have any number of elements; a rank
    without elements takes part in the same collectives. The backward pass reduces :math:`\sum g` and
    :math:`\sum g (x - \mu)` in float64, and a second backward pass reduces once more. The gradients of ``weight`` and
    ``bias`` are those of this rank, for ``DistributedDataParallel`` to average.

    The output requires a gradient if anything does on any rank, because the losses of all ranks depend on every input.
    So the backward pass has to run on all ranks or on none. All ranks have to be in the same training mode, and to have
    gradients enabled or disabled alike. If one rank does not come, the others wait for the group's timeout. On a CUDA
    device the host waits only on ranks where gradients are enabled and nothing requires one, since these have to know
    about the other ranks.

    Under ``torch.compile`` this function is a graph break and runs eagerly.

    Args:
        input: Input of shape (N, C, ...), contiguous or with channels last, or empty.
        residual: Tensor like ``input`` that is added before ReLU, or None.
        weight: Weight of shape (C), or None.
        bias: Bias of shape (C), or None.
        options: Running statistics, momentum, eps and the ceiling of ReLU.
        process_group: The ranks; ``torch.distributed.group.WORLD`` for all.

    Returns:
        The output, with the shape, dtype and strides of ``input``.

    Raises:
        TypeError: ``process_group`` is not a ``ProcessGroup``.
        RuntimeError: ``process_group`` was destroyed or never initialised, or this rank is not a member. The backward
            pass raises it if a rank on the CPU ran forward with gradients disabled.
        ValueError: On the CPU, all ranks together have one value per channel. On a CUDA device the host does not know,
            and the variance is 0 then.
    """
    if torch.compiler.is_compiling():
        eagerly: Callable[..., Tensor] = torch.compiler.disable(_synchronized)
        return eagerly(input, residual, weight, bias, options, process_group)
    return _synchronized(input, residual, weight, bias, options, process_group)


def _synchronized(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    process_group: dist.ProcessGroup,
) -> Tensor:
    check_process_group("batch_norm: process_group", process_group)
    if process_group.size() == 1 and input.numel() > 0:
        return _alone(input, residual, weight, bias, options)
    running_mean, running_var, num_batches_tracked, _, momentum, eps, ceiling = options
    graph = _ABSENT
    if torch.is_grad_enabled():
        wanted = any(t is not None and t.requires_grad for t in (input, residual, weight, bias))
        graph = _RECORDS if wanted else _FOLLOWS
    gathered = _gathered_statistics(input, graph, process_group)
    statistics = gathered.new_empty(2 * input.shape[1] + 1)
    total = None  # number of elements of a channel, if the host knows it
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
        running = (running_mean, running_var, num_batches_tracked)
        _kernels.batch_norm_combine(parts, statistics, *running, momentum)
    else:
        statistics.zero_()
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    follower = anchor() if follows else None
    call = Call(eps, ceiling, process_group, follows or graph == _RECORDS, absent)
    return _normalize(input, residual, weight, bias, follower, statistics, call)


def _alone(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """Does what a process without a group does."""
    from steadygrad.nn.functional import batch_norm  # it imports this module

    running_mean, running_var, num_batches_tracked, _, momentum, eps, ceiling = options
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
        activation=next(a for a, c in CEILINGS.items() if c == ceiling),
        num_batches_tracked=num_batches_tracked,
    )


def _any_records(gathered: Tensor) -> bool:
    """Returns whether any rank records a graph, after waiting for the device; a capture cannot wait, and assumes it."""
    if gathered.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return bool((gathered[:, -1] == _RECORDS).any())


def _gathered_statistics(input: Tensor, graph: float, group: dist.ProcessGroup) -> Tensor:
    """Gathers the statistics of all ranks and what each says about its graph, shape (ranks, 2 * channels + 2)."""
    size = 2 * input.shape[1] + 2
    record = torch.full((size,), graph, dtype=torch.float64, device=input.device)
    if input.numel() > 0:
        _kernels.batch_norm_statistics(input, record[:-1], allocator(input.device))
    else:
        record[:-1] = 0
    ranks = group.size()
    gathered = record.new_empty(ranks * size)
    # torch 2.13 renamed the function, and warns of the old name
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
        call: Call,
    ) -> Tensor:
        output = torch.empty_like(input)
        mask = None
        if input.numel() > 0:
            if call.ceiling is not None and residual is not None and call.recorded:
                mask = new_mask(input)
            affine = (residual, weight, bias)
            _kernels.batch_norm_normalize(
                input, *affine, statistics, None, None, call.eps, call.ceiling, output, mask
            )
        # Without a mask the backward pass decides ReLU once more. With one it does not read the bias, which may then
        # change in between.
        read_bias = bias if call.ceiling is not None and mask is None else None
        ctx.save_for_backward(input, weight, read_bias, statistics, mask)
        ctx.call, ctx.strides = call, input.stride()
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        if call.absent:
            raise RuntimeError(
                "batch_norm: backward: expected all ranks of process_group to take part, "
                f"but ranks {list(call.absent)} ran forward with gradients off"
            )
        input, *saved = ctx.saved_tensors
        # Hooks on saved tensors may return the input in another memory format, which would not match the mask.
        input = with_strides(input, ctx.strides)
        needed = ctx.needs_input_grad[:4]
        arguments = (grad_output, input, *saved, call, ctx.bias_dtype, needed)
        if torch.is_grad_enabled():
            grads = differentiable_gradients(anchor(), *arguments)
        else:
            grads, _ = gradients(*arguments)
        return *grads, None, None, None


_normalize: Callable[..., Tensor] = _Normalize.apply
