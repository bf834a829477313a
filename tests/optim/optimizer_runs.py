"""Runs of torch's clip and optimizer beside ours, on the same parameters and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import steadygrad as sg
from tests.optim.parameter_sets import (
    assign,
    assign_copies,
    dense_parameters,
    gradient_sequence,
    mixed_parameters,
)
from tests.snapshots import bits
from tests.tolerances import assert_close

Optimizer = torch.optim.Optimizer
Gradients = list[list[Tensor | None]]


@lru_cache(maxsize=8)
def shared_gradients(
    dtype: torch.dtype, device: torch.device, steps: int, dense: bool, decades: float
) -> Gradients:
    """Return gradients for ``mixed_parameters`` or ``dense_parameters``; copy them before writing."""
    build = dense_parameters if dense else mixed_parameters
    sequence = gradient_sequence(build(dtype, device), steps, decades=decades)
    if dense:
        like = build(dtype, device)
        for gradients in sequence:
            gradients[:] = [
                None if g is None else torch.empty_like(p).copy_(g)
                for p, g in zip(like, gradients, strict=True)
            ]
    return sequence


def plain_class(rule: str) -> type[Optimizer]:
    """Return torch's class of this name, or our plain one if torch has none."""
    found: type[Optimizer] = sg.optim.lion.Lion if rule == "Lion" else getattr(torch.optim, rule)
    return found


def make_ours(rule: str, params: Any, options: dict[str, Any], wrap: bool, **ours: Any) -> Any:
    """Return the wrapped torch optimizer, or the stabilized class."""
    options = copy.deepcopy(options)
    if wrap:
        return sg.Stabilizer(plain_class(rule)(params, **options), **ours)
    return getattr(sg.optim, rule)(params, **options, **ours)


def make_torch(rule: str, params: Any, options: dict[str, Any]) -> Optimizer:
    optimizer: Optimizer = plain_class(rule)(params, **copy.deepcopy(options))
    return optimizer


def tensor_state(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """Return the state by the parameter's index, without parameters that have none."""
    return {k: dict(v) for k, v in optimizer.state_dict()["state"].items() if v}


def assert_same_state(ours: Optimizer, theirs: Optimizer, dtype: torch.dtype) -> None:
    """Compare names, shapes, dtypes and values of the state of every parameter."""
    got, want = tensor_state(ours), tensor_state(theirs)
    assert got.keys() == want.keys()
    for index, entries in want.items():
        assert got[index].keys() == entries.keys(), f"state of parameter {index}"
        for name, value in entries.items():
            mine = got[index][name]
            if not isinstance(value, Tensor):
                assert mine == value, f"{name} of parameter {index}"
                continue
            assert isinstance(mine, Tensor)
            assert mine.dtype == value.dtype and mine.shape == value.shape, name
            assert_close(mine, value, torch.float64 if name == "step" else dtype)


def assert_same_params(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    for mine, torchs in zip(ours, theirs, strict=True):
        assert_close(mine, torchs, dtype)


def run_beside_torch(
    rule: str,
    options: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    steps: int = 50,
    swap_at: int | None = None,
    dense: bool = False,
    wrap: bool = True,
    max_norm: float = 1.0,
    build: Callable[..., list[Parameter]] | None = None,
    torch_options: dict[str, Any] | None = None,
) -> tuple[Any, Optimizer]:
    """Step both, swap their checkpoints at ``swap_at``, and compare everything; return both optimizers."""
    build = build or (dense_parameters if dense else mixed_parameters)
    mine, theirs = build(dtype, device), build(dtype, device)
    torch_options = options if torch_options is None else torch_options
    ours = make_ours(rule, mine, options, wrap, max_norm=max_norm)
    torchs = make_torch(rule, theirs, torch_options)
    sequence = shared_gradients(dtype, device, steps, dense, 6.0)
    first = [None if g is None else bits(g) for g in sequence[1]]
    for step, gradients in enumerate(sequence):
        assign(mine, gradients)
        assign_copies(theirs, gradients)
        ours.step()
        clip_grad_norm_([p for p in theirs if p.grad is not None], max_norm)
        torchs.step()
        if step == 0:
            assert ours.path == "fused"
        if step == swap_at:
            assert_same_params(mine, theirs, dtype)
            from_ours, from_torch = ours.state_dict(), torchs.state_dict()
            ours = make_ours(rule, mine, options, wrap, max_norm=max_norm)
            torchs = make_torch(rule, theirs, torch_options)
            ours.load_state_dict(copy.deepcopy(from_torch))
            torchs.load_state_dict(copy.deepcopy(from_ours))
    assert ours.path == "fused"
    assert_same_params(mine, theirs, dtype)
    assert_same_state(ours, torchs, dtype)
    for gradient, before in zip(sequence[1], first, strict=True):
        assert gradient is None or torch.equal(bits(gradient), before), "a gradient was written"
    return ours, torchs
