"""Builds small networks and batches to examine."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]


def batches(count: int = 4, size: int = 20, classes: int = 5, examples: int = 16) -> list[Batch]:
    """Return normal inputs ``(examples, size)`` with random labels, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(examples, size, generator=generator),
            torch.randint(classes, (examples,), generator=generator),
        )
        for _ in range(count)
    ]


def mlp(layers: int = 6, gain: float = 1.0, width: int = 20, classes: int = 5) -> nn.Sequential:
    """Return linear layers with ReLU between them, whose weights are ``N(0, (gain sqrt(2 / fan_in))^2)``."""
    generator = torch.Generator().manual_seed(2)
    modules: list[nn.Module] = []
    for layer in range(layers):
        linear = nn.Linear(width, width if layer < layers - 1 else classes)
        nn.init.normal_(linear.weight, 0.0, gain * (2 / width) ** 0.5, generator=generator)
        nn.init.zeros_(linear.bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Everything(nn.Module):
    """Has convolution, batch norm, dropout, a shared layer, functional ReLU, an RNN and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.shared = nn.Linear(8, 8)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 5)
        self.unused = nn.Linear(3, 3)
        self.calls = 0
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(examples, 20)`` to ``(examples, 5)``."""
        self.calls += 1
        x = self.drop(functional.relu(self.norm(self.conv(x.view(-1, 4, 5))))).mT
        x = self.shared(self.shared(x))
        self.kept.append(x)
        x = self.recurrent(x)[0]
        x = self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.last(x[:, -1])
        return out


cross_entropy = functional.cross_entropy
