"""Restores a network and the generators of random numbers."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, list, set)


@contextlib.contextmanager
def all_restored(model: nn.Module, batches: object) -> Iterator[None]:
    """Restores everything at the end of a ``with`` block, also after an exception or Ctrl-C.

    This restores the attributes of every module (mode, hooks, buffers, whatever a forward leaves there), the bits of
    parameters, buffers and ``.grad``, ``requires_grad``, and the generators of Python, NumPy, torch, CUDA and a
    DataLoader. Meanwhile it keeps a copy of parameters, buffers and gradients.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    modules = [_Attributes(module) for module in model.modules()]
    values = [_Value(tensor) for tensor in tensors.values()]
    loader: Any = getattr(batches, "generator", None)
    drawn = loader.get_state() if isinstance(loader, torch.Generator) else None
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for module in modules:
            module.restore()
        for value in values:
            value.restore()
        if drawn is not None:
            loader.set_state(drawn)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


class _Attributes:
    """The attributes of a module, and the contents of its dicts and lists."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.own = dict(vars(module))
        self.held = [(v, copy.copy(v)) for v in self.own.values() if type(v) in _CONTAINERS]

    def restore(self) -> None:
        vars(self.module).clear()
        vars(self.module).update(self.own)
        container: Any
        for container, before in self.held:
            container.clear()
            container.extend(before) if isinstance(before, list) else container.update(before)
        if self.module.training != self.training:  # A scripted module keeps the mode elsewhere.
            self.module.training = self.training


class _Value:
    """The bits of a tensor and of its gradient."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.needs_grad = tensor, tensor.requires_grad
        self.grad = tensor.grad if tensor.is_leaf else None
        self.written = [
            (t, t.detach().clone(), t._version) for t in (tensor, self.grad) if t is not None
        ]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, before, version in self.written:
                # A tensor that nobody wrote is left alone: a graph of the caller's may hold on to it.
                same = tensor.is_sparse or torch.equal(tensor, before)
                if tensor._version != version or not same:
                    tensor.copy_(before)
        if self.tensor.is_leaf:
            self.tensor.grad = self.grad
        if self.tensor.requires_grad != self.needs_grad:
            self.tensor.requires_grad_(self.needs_grad)
