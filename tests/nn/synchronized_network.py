"""The network that ranks train, in a module of its own, so that loading a saved network finds its class."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steadygrad.nn import BatchNorm1d


class Network(nn.Module):
    """Two layers with a normalization between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(3, 4, dtype=torch.float64)
        self.norm = BatchNorm1d(
            4, activation="relu", process_group=dist.group.WORLD, dtype=torch.float64
        )
        self.last = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.last(self.norm(self.first(input)))
        return output
