"""Gradient accumulation: one step for several micro-batches, by their mean."""

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
    r"""Makes the backward inside one micro-batch of the optimizer's next step.

    >>> for batch in micro_batches:
    ...     with sg.accumulate(optimizer):
    ...         loss(batch).backward()
    >>> optimizer.step()        # of the mean: its norm is taken once, its clip is the mean's
    >>> optimizer.zero_grad()

    With gradients :math:`g_1 \ldots g_n`, weights :math:`w_k` and decay :math:`d` the step's gradient is

    .. math:: \bar g = \frac{\sum_k d^{n-k} g_k}{\sum_k d^{n-k} w_k}

    so without arguments it is the sum divided by the number of micro-batches that were completed. The division is part
    of the step, where ``GradScaler``'s scale is divided out: it costs no pass.

    Gradients in bf16 and fp16 are moved from ``.grad`` to sums in fp32 after each micro-batch, and the sums freed by
    the step: 4 bytes per parameter from the first micro-batch to the step. Gradients in fp32 and fp64, and sparse
    ones, are summed in ``.grad`` by backward itself, where they stay, undivided, until ``zero_grad``. What ``.grad``
    holds before the first micro-batch counts as well, as in torch.

    Args:
        optimizer: a :class:`steadygrad.Stabilizer` or one of ``steadygrad.optim``.
        weight: what the micro-batch adds to the divisor, at least 0. The gradient is not multiplied by it: with a loss
            that is the *sum* over tokens, ``weight=tokens`` gives the mean over all tokens. A tensor of one element is
            not waited for on a CUDA device (and there a sum that is not positive skips the step). Default: 1, for
            losses that are means.
        decay: what everything before is multiplied by, more than 0 and at most 1; older micro-batches weigh less.
            Default: 1.

    A non-finite micro-batch makes the whole step non-finite, which the optimizer's policy then skips. A step that was
    taken or skipped ends the accumulation; one that raises leaves it as it is. Copies and state dicts of the optimizer
    do not have it. ``optimizer.zero_grad()`` drops it
    (``model.zero_grad()`` does not know of it). After an exception inside the block only ``zero_grad()`` goes on, since
    gradients that were added cannot be taken out again.

    Under ``DistributedDataParallel`` every rank's gradient is the average over ranks, so weights should be, too.
    Enclose all micro-batches but the last in ``no_sync()`` only where all parameters are fp32 or fp64: a rank's own
    sums of half-precision gradients are not reduced later. FSDP2's ``set_requires_gradient_sync`` is free of this.

    Source: Ott et al. 2018, "Scaling neural machine translation" (accumulation, and division by all tokens).

    Raises:
        TypeError: ``optimizer`` is not stabilized, or an argument is no number.
        ValueError: ``weight`` or ``decay`` is out of range; by ``step``: the weights add up to 0.
        RuntimeError: inside another micro-batch of the same optimizer, or after one that failed; by ``step`` and
            ``zero_grad``: inside the block; by ``step``: with a closure, or with half-precision gradients of a backward
            outside.
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
