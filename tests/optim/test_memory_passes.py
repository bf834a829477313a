"""Bytes that unscale, clip and AdamW move for each fp32 parameter, in ours and in torch's three calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steadygrad as sg
from steadygrad import _kernels
from tests.backends import Backend
from tests.snapshots import bits

SIZES = [2**16, 2**14, 2**16]
# The launches of a step are pass 1, a decision that reads sums of chunks, and pass 2.
LAUNCHES = 3


class Traffic(TorchDispatchMode):
    """Counts bytes that torch's operations read and write, each tensor once per operation that it is given to."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if func.is_view:
            return results
        given = set()
        schema = func._schema.arguments
        for argument, value in [
            *zip(schema, args, strict=False),
            *((a, kwargs[a.name]) for a in schema if a.name in kwargs),
        ]:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            # torch's fused optimizers write gradients only if they unscale them.
            if argument.name == "grads" and kwargs.get("grad_scale") is None:
                writes = False
            for tensor in tensors(value):
                self.bytes += tensor.nbytes * (2 if writes else 1)
                given.add(id(tensor))
        self.bytes += sum(tensor.nbytes for tensor in tensors(results) if id(tensor) not in given)
        return results


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def parameters(device: torch.device) -> list[Parameter]:
    return [Parameter(torch.randn(size, device=device)) for size in SIZES]


def scaled_gradients(params: list[Parameter], scaler: Any) -> None:
    """Set gradients that are large enough for the clip to be active, since its second pass is counted."""
    for param in params:
        param.grad = None
    scaler.scale(torch.stack([(p * p).sum() for p in params]).sum()).backward()


def moved_by_torch(device: torch.device, **options: bool) -> float:
    """Return the bytes per parameter of unscale, clip and AdamW once the state exists."""
    params = parameters(device)
    optimizer = torch.optim.AdamW(params, lr=1e-3, **options)
    scaler = torch.amp.GradScaler(device.type)
    for _ in range(2):
        scaled_gradients(params, scaler)
        with Traffic() as traffic:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
    return traffic.bytes / sum(SIZES)


def test_torch_moves_48(backend: Backend) -> None:
    # These are unscale 8, norm 4, clip 8 and update 28.
    assert moved_by_torch(backend.device, fused=True) == pytest.approx(48, abs=0.01)
    # That is torch's best; with one operation after the other it is 104 as of torch 2.13.
    assert moved_by_torch(backend.device, foreach=True) > 2 * 48


def test_a_step_moves_32(backend: Backend) -> None:
    params = parameters(backend.device)
    optimizer = sg.optim.AdamW(params, lr=1e-3, max_norm=1.0)
    scaler = sg.GradScaler(backend.device.type)
    for _ in range(2):
        scaled_gradients(params, scaler)
        operands = [
            [param, param.grad, *list(optimizer.state[param].values())[1:]] for param in params
        ]
        before = [[bits(tensor) for tensor in tensors(operand)] for operand in operands]
        launched = _kernels.launch_count()
        with Traffic() as traffic:
            scaler.step(optimizer)
            scaler.update()
        launched = _kernels.launch_count() - launched
    assert optimizer.clipped_steps == 2
    assert launched == (LAUNCHES if backend.asynchronous else 0)
    # Around the kernels torch runs only operations on single numbers.
    assert traffic.bytes / sum(SIZES) < 0.005
    # Pass 1 reads gradients. Pass 2 reads all operands, and writes those that have changed.
    moved = 0
    for operand, kept in zip(operands, before, strict=True):
        param, gradient, *state = tensors(operand)
        assert len(state) == 2
        moved += gradient.nbytes
        moved += sum(tensor.nbytes for tensor in (param, gradient, *state))
        for tensor, bits_before in zip((param, gradient, *state), kept, strict=True):
            changed = not torch.equal(bits(tensor), bits_before)
            assert changed == (tensor is not gradient)
            moved += tensor.nbytes * changed
    assert moved / sum(SIZES) == 32


@pytest.mark.parametrize("operand", ["gradient", "parameter", "exp_avg", "exp_avg_sq"])
def test_pass_1_reads_gradients_alone(backend: Backend, operand: str) -> None:
    # A step that is told to skip ends after pass 1. Elements that it has not read cannot have changed the norm.
    params = parameters(backend.device)
    optimizer = sg.optim.AdamW(params, lr=1e-3, max_norm=1.0)
    scaled_gradients(params, torch.amp.GradScaler("cpu", enabled=False))
    optimizer.step()
    state = optimizer.state[params[0]]
    chosen = {"gradient": params[0].grad, "parameter": params[0].data, **state}[operand]
    chosen[0] = torch.nan
    optimizer.found_inf = torch.ones((), device=backend.device)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.isfinite(optimizer.grad_norm).item() == (operand != "gradient")
