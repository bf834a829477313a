"""Gradient accumulation: one step for the mean gradient of several micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from steadygrad.optim.accumulation import checked_weight
from steadygrad.optim.options import checked_number
from steadygrad.optim.stabilized import StabilizedOptimizer


@contextmanager
def accumulate(
    optimizer: torch.optim.Optimizer, *, weight: float | Tensor = 1.0, decay: float = 1.0
) -> Iterator[None]:
    r"""Makes the backward pass inside the block one micro-batch of the optimizer's next step.

    Examples:
        >>> for batch in micro_batches:
        ...     with sg.accumulate(optimizer):
        ...         loss(batch).backward()
        >>> optimizer.step()        # steps, and clips, by the mean gradient of the micro-batches
        >>> optimizer.zero_grad()

    With gradients :math:`g_1 \ldots g_n`, weights :math:`w_k` and decay :math:`d` the step's gradient is

    .. math:: \bar g = \frac{\sum_k d^{n-k} g_k}{\sum_k d^{n-k} w_k}

    so without arguments it is the sum divided by the number of completed micro-batches. The step divides by it in the
    same place as by the scale of a ``GradScaler``, so the division needs no pass over memory of its own.

    Gradients in bf16 and fp16 are moved from ``.grad`` to sums in fp32 after each micro-batch, and the step frees the
    sums: they take 4 bytes per parameter from the first micro-batch to the step. Gradients in fp32 and fp64, and
    sparse ones, are summed in ``.grad`` by the backward pass itself. They stay there, undivided, until ``zero_grad``.
    What ``.grad`` holds before the first micro-batch counts as well, as in torch.

    A non-finite micro-batch makes the whole step non-finite, and the optimizer's ``nonfinite`` policy decides what
    happens to it. A step that was taken or skipped ends the accumulation; a step that raises leaves it as it is.
    ``optimizer.zero_grad()`` drops the accumulation, but ``model.zero_grad()`` does not know of it. Copies and state
    dicts of the optimizer do not hold it. After an exception inside the block the accumulation cannot go on, since
    gradients that were added cannot be taken out again; call ``optimizer.zero_grad()`` to start afresh.

    Under ``DistributedDataParallel`` every rank's gradient is the average over ranks, so weights should be averages,
    too. Enclose all micro-batches but the last in ``no_sync()`` only if all parameters are fp32 or fp64: a rank's own
    sums of half-precision gradients are not reduced later. FSDP2's ``set_requires_gradient_sync`` has no such limit.

    Args:
        optimizer: A :class:`steadygrad.Stabilizer` or an optimizer of ``steadygrad.optim``.
        weight: What the micro-batch adds to the divisor, at least 0. It does not multiply the gradient: with a loss
            that is the *sum* over tokens, ``weight=tokens`` gives the mean over all tokens. A tensor of one element on
            a CUDA device is read there, without waiting; weights that do not add up to a positive number then skip the
            step. Default: 1, for losses that are means.
        decay: The factor for everything accumulated before, more than 0 and at most 1. Less than 1 makes older
            micro-batches count less. Default: 1.

    Raises:
        TypeError: ``optimizer`` is not stabilized, or an argument is not a number.
        ValueError: ``weight`` or ``decay`` is out of range. ``step`` raises it if the weights add up to 0.
        RuntimeError: The block is inside another micro-batch of the same optimizer, or follows one that failed.
            ``step`` and ``zero_grad`` raise it inside the block. ``step`` raises it if it is called with a closure, or
            if a backward pass outside such a block left half-precision gradients in ``.grad``.

    Source: Ott et al. 2018, "Scaling neural machine translation" (accumulation, and division by all tokens).
    """
    if not isinstance(optimizer, StabilizedOptimizer):
        raise TypeError(
            "accumulate: optimizer: expected a steadygrad.Stabilizer or one of steadygrad.optim, "
            f"got {type(optimizer).__name__}"
        )
    weight = checked_weight(weight)
    factor = checked_number("accumulate: decay", decay)
    if not 0 < factor <= 1:
        raise ValueError(f"accumulate: decay: expected a number > 0 and <= 1, got {decay!r}")
    accumulated = optimizer.accumulated
    accumulated.begin(_params(optimizer), factor)
    try:
        yield
    except BaseException as error:
        accumulated.fail(error)
        raise
    accumulated.complete(_params(optimizer), weight)


def _params(optimizer: StabilizedOptimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
