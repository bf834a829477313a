"""The two sides of the batch-norm races: steadygrad's module, and what people write with torch's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from benchmarks.ours import OURS
from benchmarks.timer import Candidate
from steadygrad import nn

TORCH = "torch"
TORCH_IN_PLACE = "torch in-place"
CUDNN = "torch cuDNN"
CUDNN_IN_PLACE = "torch cuDNN, in-place"
NATIVE = "torch native"
NATIVE_IN_PLACE = "torch native, in-place"


@dataclass(frozen=True)
class Layer:
    """One call that is measured.

    Attributes:
        shape: of the input; the second dimension is the channels.
        dtype: of the input; parameters and running statistics are fp32, as under autocast.
        channels_last: the layout of 4-D input.
        add: whether a residual is added.
        relu: whether ReLU follows.
        training: forward and backward; else forward alone, with the running statistics.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    add: bool = False
    relu: bool = False
    training: bool = True


class Tensors:
    """Input, residual, gradient and parameters of one candidate: the same numbers for each."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        """Draw the numbers.

        Args:
            layer: what is measured.
            device: where the tensors live.
        """
        generator = torch.Generator(device).manual_seed(0)
        layout = torch.channels_last if layer.channels_last else torch.contiguous_format

        def normal() -> Tensor:
            made = torch.empty(layer.shape, dtype=layer.dtype, device=device, memory_format=layout)
            return made.normal_(generator=generator)

        self.layer, self.device = layer, device
        self.input = normal().requires_grad_(layer.training)
        self.residual = normal().requires_grad_(layer.training) if layer.add else None
        self.grad_output = normal() if layer.training else None
        channels = layer.shape[1]
        self.weight = torch.rand(channels, generator=generator, device=device) + 0.5
        self.bias = torch.randn(channels, generator=generator, device=device)

    def take(self, module: torch.nn.Module) -> list[Tensor]:
        """Set up the module and say what is differentiated: the inputs, then the parameters."""
        module.to(self.device).train(self.layer.training)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            parameters["weight"].copy_(self.weight)
            parameters["bias"].copy_(self.bias)
        inputs = [self.input] if self.residual is None else [self.input, self.residual]
        return [*inputs, *parameters.values()]

    def candidate(
        self,
        name: str,
        module: torch.nn.Module,
        forward: Callable[[], Tensor],
        setting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Candidate:
        """Forward and backward, or forward alone, within `setting`.

        Gradients are returned, not accumulated: a `.grad` could be a copy on one side and none on
        the other.
        """
        sources, grad_output = self.take(module), self.grad_output

        def train() -> tuple[Tensor, ...]:
            with setting():
                output = forward()
                return (output, *torch.autograd.grad(output, sources, grad_output))

        def evaluate() -> tuple[Tensor, ...]:
            with torch.no_grad(), setting():
                return (forward(),)

        return Candidate(name, train if self.layer.training else evaluate)


def ours(layer: Layer, device: torch.device) -> Candidate:
    """Our module, which adds and rectifies by itself."""
    tensors = Tensors(layer, device)
    kind = nn.BatchNorm1d if len(layer.shape) == 2 else nn.BatchNorm2d
    module = kind(layer.shape[1], activation="relu" if layer.relu else None)
    x, residual = tensors.input, tensors.residual
    if residual is None:
        return tensors.candidate(OURS, module, lambda: module(x))
    return tensors.candidate(OURS, module, lambda: module(x, residual))


@dataclass(frozen=True)
class Peer:
    """torch's module with the usual calls behind it.

    Attributes:
        name: what the tables call it.
        in_place: whether the residual is added and ReLU taken in place, as in torchvision's ResNet.
        cudnn: on a GPU, whether torch may use cuDNN; None leaves torch's setting.
    """

    name: str
    in_place: bool = False
    cudnn: bool | None = None

    def build(self, layer: Layer, device: torch.device) -> Candidate:
        """The candidate over tensors of its own."""
        tensors = Tensors(layer, device)
        kind = torch.nn.BatchNorm1d if len(layer.shape) == 2 else torch.nn.BatchNorm2d
        module = kind(layer.shape[1])
        x, residual, in_place = tensors.input, tensors.residual, self.in_place

        def forward() -> Tensor:
            output: Tensor = module(x)
            if residual is not None:
                output = output.add_(residual) if in_place else output + residual
            return relu(output, inplace=in_place) if layer.relu else output

        return tensors.candidate(self.name, module, forward, self._setting)

    def _setting(self) -> AbstractContextManager[object]:
        if self.cudnn is None:
            return nullcontext()
        flags: AbstractContextManager[object] = torch.backends.cudnn.flags(enabled=self.cudnn)
        return flags


_PLAIN = (Peer(TORCH),)
_CUDA_PLAIN = (Peer(CUDNN, cudnn=True), Peer(NATIVE, cudnn=False))
PEERS = (*_PLAIN, Peer(TORCH_IN_PLACE, in_place=True))
CUDA_PEERS = (
    *_CUDA_PLAIN,
    Peer(CUDNN_IN_PLACE, in_place=True, cudnn=True),
    Peer(NATIVE_IN_PLACE, in_place=True, cudnn=False),
)


def peers(layer: Layer, cuda: bool) -> tuple[Peer, ...]:
    """What a layer is compared with; without ReLU there is nothing to do in place."""
    chosen = CUDA_PEERS if cuda else PEERS
    return tuple(peer for peer in chosen if layer.relu or not peer.in_place)
