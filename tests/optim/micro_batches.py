"""Micro-batches with known gradients, and the mean that a step has to take of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.reference.accumulation import accumulated_mean
from tests.optim.optimizer_kinds import MAKERS
from tests.optim.parameter_sets import gradient_sequence
from tests.tolerances import float64

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALF]
all_kinds = pytest.mark.parametrize("kind", MAKERS)
half_dtypes = pytest.mark.parametrize("dtype", HALF, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Gradients = Sequence[Sequence[Tensor | None]]


def backward(
    params: Sequence[Parameter], grads: Sequence[Tensor | None], scaler: Any = None
) -> None:
    """Run backward of a loss whose gradients are these."""
    losses = [(p * g).sum().float() for p, g in zip(params, grads, strict=True) if g is not None]
    loss = torch.stack(losses).sum()
    (loss if scaler is None else scaler.scale(loss)).backward()


def add(optimizer: Any, params: Sequence[Parameter], grads: Gradients, **how: Any) -> None:
    for batch in grads:
        with sg.accumulate(optimizer, **how):
            backward(params, batch)


def mean_of(grads: Gradients, **how: Any) -> list[Any]:
    """Return each parameter's mean gradient in float64; missing gradients count as zeros."""
    return [
        accumulated_mean([0.0 * float64(some[0]) if g is None else float64(g) for g in some], **how)
        for some in zip(*grads, strict=True)
    ]


def batches(params: Sequence[Parameter], count: int, seed: int = 0) -> list[list[Tensor | None]]:
    """Return gradients of ``count`` micro-batches; the first one has a gradient for every parameter."""
    return gradient_sequence(params, count, seed=seed, decades=1.0)
