"""A small transformer, with its normalization where Vaswani et al. 2017 have it, or before the layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LONGEST = 256


@dataclass(frozen=True)
class Transformer:
    """A causal transformer over codes, with learned positions and an output for each place.

    Attributes:
        layers: attention and feed-forward blocks.
        width: of the residual stream; four times that between the two layers of a block.
        heads: of each attention.
        pre_norm: whether layer norms come before the layers, inside of the residual branches (Xiong et al. 2020), and
            not behind the sums.
        init_gain: factor of the weights that Glorot's rule draws; embeddings have a deviation of 0.02 times it.
        dropout: probability that a unit is dropped, as in ``torch.nn.TransformerEncoderLayer``.
    """

    layers: int = 4
    width: int = 32
    heads: int = 2
    pre_norm: bool = False
    init_gain: float = 1.0
    dropout: float = 0.0

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
        """Return ``(batch, length, outputs)`` for ``(batch, length)``."""
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        states = self.embedding(codes) + self.positions[:length]
        outputs: Tensor = self.output(self.blocks(states, mask, is_causal=True))
        return outputs
