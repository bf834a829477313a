"""Accumulation under DistributedDataParallel: every rank steps by the mean over micro-batches and ranks."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import steadygrad as sg
from steadygrad.reference.norm import total_norm
from tests.ranks import found, join_ranks, leave_ranks

RANKS = 2
MICRO_BATCHES = 4
TIME_LIMIT = 60  # seconds for both ranks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(5, generator=generator).to(dtype) for _ in range(MICRO_BATCHES)]


class Product(torch.nn.Module):
    """A module whose gradient is its input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(5, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, world, folder)
    results = {}
    for name, dtype in DTYPES.items():
        model = torch.nn.parallel.DistributedDataParallel(Product(dtype))
        optimizer = sg.optim.SGD(model.parameters(), lr=1.0, max_norm=0.5)
        for step, x in enumerate(inputs(rank, dtype)):
            with ExitStack() as stack:
                # What a rank has summed in fp32 apart from .grad is never reduced later.
                if dtype == torch.float32 and step < MICRO_BATCHES - 1:
                    stack.enter_context(model.no_sync())
                stack.enter_context(sg.accumulate(optimizer))
                model(x).backward()
        optimizer.step()
        results[name] = {"norm": optimizer.grad_norm, "weight": model.module.weight.detach()}
    leave_ranks(results, rank, folder)


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
@pytest.mark.parametrize("name", DTYPES)
def test_every_rank_steps_by_the_mean_of_all(name: str) -> None:
    dtype = DTYPES[name]
    everything = torch.stack([x for rank in range(RANKS) for x in inputs(rank, dtype)])
    mean = everything.double().mean(0)
    # Averages over two ranks are rounded to bf16 once more.
    error = 1e-6 if dtype == torch.float32 else 2.0**-8
    norm = total_norm([mean.numpy()])
    assert norm > 0.5
    ranks = found(Path(__file__), RANKS, TIME_LIMIT, name)
    for rank in ranks:
        assert rank["norm"].item() == pytest.approx(norm, rel=error)
        want = -mean * 0.5 / (norm + 1e-6)
        torch.testing.assert_close(rank["weight"].double(), want, rtol=0, atol=2 * error)
    assert torch.equal(ranks[0]["weight"], ranks[1]["weight"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
