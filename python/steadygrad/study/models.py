"""The networks the study trains."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Mlp:
    """A plain fully connected ReLU network: no normalization, no skip connections.

    Attributes:
        layers: number of linear layers, output layer included; a ReLU follows each but the last.
        width: units of each hidden layer.
        init_gain: weights are drawn from ``N(0, (init_gain * sqrt(2 / fan_in))^2)``; 1 is the
            initialization of He et al. 2015, which keeps the scale of activations and gradients
            from layer to layer. Any other gain multiplies both by ``init_gain`` per layer: 1.5
            makes them ``1.5^20 = 3325`` times too large over 20 layers.
    """

    layers: int
    width: int
    init_gain: float

    def build(
        self,
        features: int,
        classes: int,
        generator: torch.Generator,
        init_gain: float | None = None,
    ) -> nn.Sequential:
        """Build the network with weights drawn from ``generator`` and zero biases.

        Args:
            features: size of an input.
            classes: number of outputs.
            generator: source of the weights; the same draws serve every ``init_gain``.
            init_gain: used in place of the one of this specification when given.
        """
        gain = self.init_gain if init_gain is None else init_gain
        sizes = [features, *[self.width] * (self.layers - 1), classes]
        modules: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
            nn.init.normal_(linear.weight, 0.0, gain * math.sqrt(2.0 / fan_in), generator=generator)
            nn.init.zeros_(linear.bias)
            modules += [linear, nn.ReLU()]
        return nn.Sequential(*modules[:-1])
