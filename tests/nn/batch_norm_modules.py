"""Pairs of modules, torch's and ours, and one step of training or evaluation through both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steadygrad as sg
from steadygrad.reference.batch_norm import Activation
from tests.nn import batch_norm_calls

# Input shapes, with the number of dimensions of the module that takes them.
SHAPES = [
    ((6, 5), 1),
    ((6, 5, 7), 1),
    ((4, 5, 3, 3), 2),
    ((4, 5, 1, 1), 2),
    ((2, 5, 3, 2, 3), 3),
]
# The tests of the kernels have ReLU6 after a residual, too.
FUSIONS = {name: fusion for name, fusion in batch_norm_calls.FUSIONS.items() if name != "add+relu6"}
FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu6": F.relu6}
LAYOUTS = ["first", "last", "strided"]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the same numbers contiguous, with channels last, or with gaps between them."""
    if layout == "first":
        return tensor.contiguous()
    if layout == "last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


class Pair:
    """A module of torch's with what follows it, and ours with the same parameters and buffers."""

    def __init__(
        self,
        dimensions: int,
        *,
        fusion: str = "bn",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        channels: int = 5,
        **options: Any,
    ) -> None:
        self.activation, self.adds = FUSIONS[fusion]
        self.theirs: nn.Module = getattr(nn, f"BatchNorm{dimensions}d")(
            channels, device=device, dtype=dtype, **options
        )
        self.ours: nn.Module = getattr(sg.nn, f"BatchNorm{dimensions}d")(
            channels,
            device=device,
            dtype=dtype,
            activation=self.activation,
            **options,
        )
        with torch.no_grad():
            for tensor in [*self.theirs.parameters(), *self.theirs.buffers()]:
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 2)
            if self.activation == "relu6" and self.theirs.weight is not None:
                self.theirs.weight.mul_(4)  # so that some elements reach the ceiling
        self.ours.load_state_dict(self.theirs.state_dict())

    def train(self, mode: bool) -> Pair:
        self.theirs.train(mode)
        self.ours.train(mode)
        return self

    def torch_call(self, input: Tensor, residual: Tensor | None) -> Tensor:
        output = self.theirs(input)
        if residual is not None:
            output = output + residual
        return output if self.activation is None else FUNCTIONS[self.activation](output)

    def results(self, input: Tensor, residual: Tensor | None = None) -> list[list[Tensor]]:
        """Return outputs, gradients and buffers: torch's, then ours."""
        found = []
        for module, call in ((self.theirs, self.torch_call), (self.ours, self.ours)):
            x = input.detach().requires_grad_()
            r = None if residual is None else residual.detach().requires_grad_()
            output = call(x, r)
            weights = torch.linspace(-1, 1, output.numel(), device=output.device)
            output.backward(weights.view(output.shape).to(output.dtype))
            tensors = [output.detach(), x.grad, None if r is None else r.grad]
            tensors += [p.grad for p in module.parameters()]
            tensors += [b.clone() for b in module.buffers()]
            module.zero_grad()
            found.append([t for t in tensors if t is not None])
        return found

    def assert_equal(
        self, input: Tensor, residual: Tensor | None = None, **tolerance: float
    ) -> None:
        """Check a call of ours against torch's."""
        if residual is None and self.adds:
            residual = torch.randn_like(input)
        theirs, ours = self.results(input, residual)
        assert len(theirs) == len(ours)
        for want, got in zip(theirs, ours, strict=True):
            assert want.dtype == got.dtype
            torch.testing.assert_close(got, want, **tolerance)


def twin(module: nn.Module) -> nn.Module:
    """Return a module with the same parameters and buffers in memory of its own."""
    return copy.deepcopy(module)
