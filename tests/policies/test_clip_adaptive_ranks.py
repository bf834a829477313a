"""Clipping by output unit over two ranks: whole units are clipped as in one process, split ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.policies.adaptive_rank import BACKENDS_RUN, made, take_steps, values
from tests.ranks import found

SCRIPT = Path(__file__).with_name("adaptive_rank.py")
TIME_LIMIT = 90.0
REFUSED = (
    "step: clip: ClipAdaptive: parameters[0] ('body.weight'): expected every rank to hold whole units, "
    "Shard(0) of two or more dimensions, or replicas, got a DTensor of shape "
)


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS_RUN])
def test_whole_units_are_clipped_as_in_one_process(name: str) -> None:
    params = [Parameter(value) for value in values(0)]
    optimizer = made(params)
    take_steps(params, optimizer, lambda tensor, _: tensor)
    for rank in found(SCRIPT, 2, TIME_LIMIT, name):
        assert rank["path"] == "fused"
        norm: Tensor = rank["norm"]
        assert torch.allclose(norm, optimizer.grad_norm, rtol=1e-12)
        for got, want in zip(rank["weights"], params, strict=True):
            assert torch.allclose(got, want.detach(), rtol=1e-12, atol=1e-14)


def test_units_that_are_cut_are_refused() -> None:
    for rank in found(SCRIPT, 2, TIME_LIMIT, "messages"):
        assert rank["columns"].startswith(REFUSED + "(4, 6) with placements (Shard(dim=1),).")
        assert rank["vector"].startswith(REFUSED + "(6,) with placements (Shard(dim=0),).")
        assert rank["later"].startswith(REFUSED + "(4, 6)")
        assert "clipping=None (it is in param_groups[0])" in rank["columns"]
        for name in ("rows", "replica", "left out", "mesh of one"):
            assert rank[name] == "taken"
