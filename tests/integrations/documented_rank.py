"""One rank of a gloo group: runs every snippet of docs/distributed.md, and saves the results in a file."""

from __future__ import annotations

import contextlib
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import parallel

import steadygrad as sg
from tests.distributed.parts_rank import ZeroRedundancyOptimizer
from tests.integrations.documented_snippets import snippets
from tests.ranks import leave_ranks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).relu())
        return y


def names(rank: int) -> dict[str, Any]:
    """Return the names that the page's snippets use without defining or importing them."""
    torch.manual_seed(5)
    model = nn.Sequential(Layer(), Layer(), Layer())
    torch.manual_seed(50 + rank)
    return {
        **{name: getattr(parallel, name) for name in parallel.__all__},
        **{"torch": torch, "nn": nn, "dist": dist, "sg": sg, "contextlib": contextlib},
        **{"init_device_mesh": init_device_mesh, "fully_shard": fully_shard},
        **{"ZeroRedundancyOptimizer": ZeroRedundancyOptimizer},
        **{"model": model, "inputs": torch.randn(8, 8), "device": "cpu"},
    }


def after(scope: dict[str, Any]) -> dict[str, Any]:
    """Step if the snippet only made the optimizer, and return the result."""
    optimizer = scope.get("optimizer")
    if optimizer is None:
        return {"norm": float(scope["norm"]), "skipped": 0}
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer = optimizer.optim
    if not optimizer.has_stepped:
        x = scope.get("stage", scope["model"])(scope["inputs"])
        if "experts" in scope:
            x = scope["experts"](x)
        x.square().mean().backward()
        optimizer.step()
    return {"norm": float(optimizer.grad_norm), "skipped": optimizer.skipped_steps}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    found = {}
    for title, code in snippets().items():
        sys.stderr.write(f"{title}\n")
        scope = names(rank)
        exec(compile(code, title, "exec"), scope)
        found[title] = after(scope)
    dist.barrier()
    leave_ranks(found, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
