"""Declare experiments with a small transformer, post-LN as in Vaswani et al. 2017."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import steadygrad as sg

from .experiment import Experiment, Problem
from .remedies import Arm, named
from .sequences import NextCharacter

_LONGEST = 256


@dataclass(frozen=True)
class Transformer:
    """Describes a causal transformer over codes, with learned positions and an output per place.

    Attributes:
        layers: Number of blocks of attention and feed-forward layers.
        width: Width of the residual stream; the feed-forward layers are four times as wide inside.
        heads: Number of heads of each attention.
        pre_norm: Whether layer norms come before the layers, inside the residual branches (Xiong et
            al. 2020), instead of after the sums.
        init_gain: Factor of the weights that Glorot's rule draws; embeddings are drawn with a
            standard deviation of 0.02 times this factor.
        dropout: Probability that a unit is dropped, as in ``torch.nn.TransformerEncoderLayer``.
        activation: Activation function of the feed-forward layers, ``"relu"`` or ``"gelu"``.
    """

    layers: int = 4
    width: int = 32
    heads: int = 2
    pre_norm: bool = False
    init_gain: float = 1.0
    dropout: float = 0.0
    activation: str = "relu"

    def build(self, inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
        """Build the network with weights drawn from ``generator`` and zero biases."""
        return _Network(self, inputs, outputs, generator)


class _Network(nn.Module):
    def __init__(
        self, spec: Transformer, inputs: int, outputs: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(inputs, spec.width)
        self.positions = nn.Parameter(torch.empty(_LONGEST, spec.width))
        layer = nn.TransformerEncoderLayer(
            spec.width,
            spec.heads,
            4 * spec.width,
            spec.dropout,
            spec.activation,
            batch_first=True,
            norm_first=spec.pre_norm,
        )
        norm = nn.LayerNorm(spec.width) if spec.pre_norm else None
        self.blocks = nn.TransformerEncoder(layer, spec.layers, norm, enable_nested_tensor=False)
        self.output = nn.Linear(spec.width, outputs)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1 and name.startswith(("embedding", "positions")):
                    nn.init.normal_(p, 0.0, 0.02 * spec.init_gain, generator=generator)
                elif p.dim() > 1:
                    nn.init.xavier_uniform_(p, spec.init_gain, generator=generator)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

    def forward(self, codes: Tensor) -> Tensor:
        """Return outputs, ``(batch, length, outputs)``, for codes, ``(batch, length)``."""
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        states = self.embedding(codes) + self.positions[:length]
        outputs: Tensor = self.output(self.blocks(states, mask, is_causal=True))
        return outputs


PRE_NORM = Arm("pre-LN", "placement of the norm", "Xiong et al.", model={"pre_norm": True})
SMALL_INIT = Arm("init / 2", "initialisation", "half of Glorot's", model={"init_gain": 0.5})
FEWER = Arm("2 blocks", "fewer layers", "in the place of 4", model={"layers": 2})
GELU = Arm("GELU", "activation", model={"activation": "gelu"})

_ARMS = (
    *named(
        "none, clip 1, clip .25, clip value, Damp, ClipPercentile, ClipZScore, ClipZScore capped, "
        "ClipRelative, ClipRelative uncapped, SkipSpikes, SkipSpikes + LRBackoff, "
        "clip 1 + SkipSpikes, L1, L2, weight decay, dropout, warmup, cosine, step decay, "
        "ReduceLROnPlateau, accumulate 4, clip 1 + L2, clip 1 + warmup"
    ),
    PRE_NORM,
    SMALL_INIT,
    FEWER,
    GELU,
)


@dataclass(frozen=True)
class AdamWArm(Arm):
    """Declares a remedy in front of AdamW instead of SGD."""

    def stepper(
        self, parameters: Sequence[nn.Parameter], learning_rate: float, momentum: float
    ) -> sg.Stabilizer:
        """Make AdamW with this remedy in front of it; ``momentum`` is its beta1."""
        adamw: Any = torch.optim.AdamW(
            parameters, learning_rate, (momentum, 0.999), weight_decay=self.weight_decay
        )
        return self.stabilized(adamw)


def _with_adamw(arm: Arm) -> AdamWArm:
    fields = {field.name: getattr(arm, field.name) for field in dataclasses.fields(arm)}
    return AdamWArm(**fields)


def _experiment(
    optimizer: str, arms: tuple[Arm, ...], rates: tuple[float, ...], momentum: float, about: str
) -> Experiment:
    return Experiment(
        name=f"transformer-{optimizer.lower()}",
        title=f"A post-LN transformer on the help texts of CPython, with {optimizer}",
        about="Four blocks with the layer norms behind the sums, as in Vaswani et al. 2017, and no "
        f"warm-up: {about}.",
        problems=(
            Problem(
                name=f"post-LN, {optimizer}",
                title=f"4 post-LN blocks of 32 units on pieces of 64 characters, {optimizer}",
                task=NextCharacter,
                model=Transformer(),
                steps=300,
                batch_size=16,
                momentum=momentum,
            ),
        ),
        arms=arms,
        learning_rates=rates,
    )


# The learning rates were found by runs with one seed.
TRANSFORMER_SGD = _experiment(
    "SGD",
    _ARMS,
    (0.3, 1.0, 3.0),
    0.9,
    "at the lowest rate it finds the frequencies of the characters, at the others it explodes",
)
TRANSFORMER_ADAMW = _experiment(
    "AdamW",
    tuple(map(_with_adamw, _ARMS)),
    (3e-3, 1e-2, 1.0),
    0.9,
    "at the lowest rate it learns, at .01 it stays at the frequencies of the characters, and at 1 its "
    "loss explodes",
)
