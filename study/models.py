"""Build the networks that the study trains."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from steadygrad import nn as stable_nn

from .tasks import image_shape

By = Literal["steadygrad", "torch"]


class ModelSpec(Protocol):
    """Describes a network that it can build; an arm's ``model`` replaces fields of it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
        """Build the network; weights, and biases that are not zero, are drawn from ``generator``."""


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
}


class ActivationTerm(nn.Module):
    """Computes the penalty ``l1 sum |a| + l2 sum a^2 / 2`` of its input in torch, for the loss."""

    def __init__(self, l1: float, l2: float) -> None:
        super().__init__()
        self.l1, self.l2 = l1, l2
        self.term: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.term = self.l1 * input.abs().sum() + 0.5 * self.l2 * input.square().sum()
        return input


@dataclass(frozen=True)
class _Layers:
    """Describes what follows a layer, and how its weights are drawn."""

    # "he" (He et al. 2015), "xavier" (Glorot and Bengio 2010), "orthogonal" (Saxe et al. 2013) or
    # "torch" (what reset_parameters draws).
    init: str = "he"
    # Factor of the initial weights. With "he" they are drawn from
    # N(0, (init_gain * sqrt(2 / fan_in))^2): 1 keeps the scale of activations and gradients from
    # layer to layer under ReLU. Any other gain multiplies both by init_gain per layer: 1.5 makes
    # them 1.5^20 = 3325 times too large over 20 layers.
    init_gain: float = 1.0
    activation: str = "relu"  # a key of ACTIVATIONS
    norm: By | None = None  # whose batch norm goes before each activation
    dropout: float = 0.0  # probability that a unit is dropped after its activation
    activation_l1: float = 0.0  # weight of the sum of magnitudes of activations, a batch mean
    activation_l2: float = 0.0  # weight of half the sum of squares of activations, a batch mean
    activation_by: By = "steadygrad"  # whose penalty of activations
    batch_size: int = 32  # divisor of the penalty of activations

    def after(self, channels: int, norms: tuple[Any, Any]) -> list[nn.Module]:
        """Return the modules after a hidden layer with ``channels`` outputs.

        ``norms`` are the batch norm classes of steadygrad and of torch.
        """
        modules: list[nn.Module] = []
        activation = ACTIVATIONS[self.activation]
        if self.norm == "steadygrad" and activation is nn.ReLU:
            modules.append(norms[0](channels, activation="relu"))
        else:
            if self.norm is not None:
                modules.append(norms[self.norm == "torch"](channels))
            modules.append(activation())
        if self.activation_l1 or self.activation_l2:
            weights = self.activation_l1 / self.batch_size, self.activation_l2 / self.batch_size
            ours = self.activation_by == "steadygrad"
            modules.append((stable_nn.ActivationPenalty if ours else ActivationTerm)(*weights))
        if self.dropout:
            modules.append(nn.Dropout(self.dropout))
        return modules

    def draw(self, layer: nn.Module, fan_in: int, generator: torch.Generator) -> None:
        """Draw the weights of a layer and set its biases to zero."""
        weight: Any = layer.weight
        if self.init == "he":  # a gain scales the draws and does not change them
            he = self.init_gain * math.sqrt(2.0 / fan_in)
            nn.init.normal_(weight, 0.0, he, generator=generator)
        elif self.init == "xavier":
            nn.init.xavier_normal_(weight, self.init_gain, generator=generator)
        elif self.init == "orthogonal":
            nn.init.orthogonal_(weight, self.init_gain * math.sqrt(2.0), generator=generator)
        elif self.init == "torch":
            nn.init.kaiming_uniform_(weight, math.sqrt(5.0), generator=generator)
        else:
            raise ValueError(f"{type(self).__name__}: init: unknown initialization {self.init!r}")
        bias: Any = layer.bias
        nn.init.zeros_(bias)


@dataclass(frozen=True)
class Mlp(_Layers):
    """Describes a fully connected network without skip connections."""

    layers: int = 20  # linear layers, with the output layer; activations follow all but the last
    width: int = 100  # units of each hidden layer

    def build(self, inputs: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
        sizes = [inputs, *[self.width] * (self.layers - 1), outputs]
        modules: list[nn.Module] = []
        for place, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            modules.append(nn.utils.skip_init(nn.Linear, fan_in, fan_out))
            self.draw(modules[-1], fan_in, generator)
            if place < self.layers - 1:
                modules += self.after(fan_out, (stable_nn.BatchNorm1d, nn.BatchNorm1d))
        return nn.Sequential(*modules)


@dataclass(frozen=True)
class PlainCnn(_Layers):
    """Describes a deep convolutional network without skip connections, for flattened square images.

    It has two convolutions of stride 2, then convolutions of stride 1, all 3 x 3, and a linear
    layer over the mean of each channel.
    """

    layers: int = 9  # layers with weights, with the linear layer
    channels: int = 16  # output channels of each convolution

    def build(self, inputs: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
        shape = image_shape(inputs)
        modules: list[nn.Module] = [nn.Unflatten(1, shape)]
        channels = shape[0]
        for place in range(self.layers - 1):
            stride = 2 if place < 2 else 1
            conv = nn.utils.skip_init(
                nn.Conv2d, channels, self.channels, 3, stride=stride, padding=1
            )
            self.draw(conv, 9 * channels, generator)
            channels = self.channels
            modules += [conv, *self.after(channels, (stable_nn.BatchNorm2d, nn.BatchNorm2d))]
        linear = nn.utils.skip_init(nn.Linear, channels, outputs)
        self.draw(linear, channels, generator)
        return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


@dataclass(frozen=True)
class Recurrent:
    """Describes a recurrent network: one layer of tanh units, and a linear layer over its states."""

    hidden: int = 50  # number of units
    embedding: int = 0  # size of the vector of an input code; 0: inputs are vectors
    every_step: bool = False  # whether every state has an output, or only the last
    # Recurrent weights are drawn from N(0, (recurrent_gain / sqrt(hidden))^2), whose largest
    # eigenvalue is about recurrent_gain in magnitude. None draws them as torch does, uniformly
    # within 1 / sqrt(hidden), where the largest eigenvalue is about 0.58.
    recurrent_gain: float | None = None

    def build(self, inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
        return _RecurrentNetwork(self, inputs, outputs, generator)


class _RecurrentNetwork(nn.Module):
    def __init__(
        self, spec: Recurrent, inputs: int, outputs: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.every_step = spec.every_step
        self.embedding: nn.Module = (
            nn.utils.skip_init(nn.Embedding, inputs, spec.embedding)
            if spec.embedding
            else nn.Identity()
        )
        self.recurrent = nn.RNN(spec.embedding or inputs, spec.hidden, batch_first=True)
        self.output = nn.utils.skip_init(nn.Linear, spec.hidden, outputs)
        bound = 1.0 / math.sqrt(spec.hidden)
        for name, parameter in self.named_parameters():
            if name.startswith("embedding"):
                nn.init.normal_(parameter, generator=generator)
            elif "weight_hh" in name and spec.recurrent_gain is not None:
                nn.init.normal_(parameter, 0.0, spec.recurrent_gain * bound, generator=generator)
            else:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs, ``(batch, length, outputs)`` for all steps or ``(batch, outputs)`` for the last."""
        states = self.recurrent(self.embedding(inputs))[0]
        outputs: Tensor = self.output(states if self.every_step else states[:, -1])
        return outputs
