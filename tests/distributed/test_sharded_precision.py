"""Half precision, accumulation and loss scaling over ranks that share parameters, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadygrad as sg
from tests.backends import Backend
from tests.distributed.checkpoint_cases import Case, contents, joined, network, train
from tests.distributed.sharded_precision import (
    ELEMENTS,
    HALF_CASES,
    MICRO_BATCHES,
    SCALED_STEPS,
    micro_batch,
    product,
    scale_up,
    spoilt,
)
from tests.distributed.test_sharded import pytestmark as pytestmark
from tests.distributed.test_sharded_situations import found
from tests.distributed.test_sharded_situations import ran_on as ran_on
from tests.distributed.test_sharded_situations import world as world

SCALERS = [f"{kind} {unscaled}" for kind in ("ours", "torch") for unscaled in (False, True)]


def assert_same_bits(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_is_that_of_one_process(world: int, ran_on: Backend, case: Case) -> None:
    ranks = [rank[str(case)] for rank in found(world, ran_on, "half_precision")]
    runs = [joined(list(run)) for run in zip(*ranks, strict=True)]
    net = network(case, seed=1)
    optimizer = case.optimizer(net)
    train(net, optimizer, range(6))
    want = contents(net, optimizer)
    assert want["groups"][0]["skipped_steps"] == 1
    if case.rounding != "stochastic":
        assert_same_bits(runs[0], want)
        return
    assert_same_bits(runs[1], runs[0])  # a second run has the same bits
    assert_same_bits(runs[0]["groups"], want["groups"])
    assert runs[0]["groups"][0]["rounded_steps"] == 5
    # Each step may round to either neighbour.
    torch.testing.assert_close(runs[0]["weights"], want["weights"], rtol=0.03, atol=0.03)


def test_rounding_by_chance_is_unbiased(world: int, ran_on: Backend) -> None:
    ranks = found(world, ran_on, "rounded_by_chance")
    for name in ("sharded", "replicated"):
        for rank in ranks:
            up = rank[name] != 1
            assert torch.equal(rank[name][up], torch.full_like(rank[name][up], 1 + 2.0**-7))
            count = len(up)
            assert count == ELEMENTS // (world if name == "sharded" else 1)
            deviation = (count * 0.25 * 0.75) ** 0.5
            assert abs(int(up.sum()) - 0.25 * count) < 4 * deviation
    for rank in ranks:  # replicas have to stay equal
        assert torch.equal(rank["replicated"], ranks[0]["replicated"])


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_of_shards(
    world: int, ran_on: Backend, dtype: torch.dtype, sync: bool
) -> None:
    layer = product(dtype)
    optimizer = sg.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, max_norm=0.25)
    for step in range(2):
        for number in range(MICRO_BATCHES):
            with sg.accumulate(optimizer):
                (whole_loss(layer, 3 * step + number, world, dtype) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    norm = optimizer.grad_norm
    assert norm is not None and norm > 0.25
    for rank in found(world, ran_on, "accumulated"):
        one = rank[f"{dtype} {sync}"]
        assert_same_bits(one["weight"], layer.weight.detach())
        assert one["norm"] == float(norm)
        half = dtype == torch.bfloat16
        assert one["sums"] == ([("DTensor", "torch.float32")] if half else [])


def whole_loss(layer: nn.Module, number: int, world: int, dtype: torch.dtype) -> Tensor:
    """Return the loss over all ranks."""
    parts = [micro_batch(number, rank, dtype) for rank in range(world)]
    total: Tensor = sum((layer(input) * weight).sum() for input, weight in parts)  # type: ignore
    return total


@pytest.mark.parametrize("scaler", SCALERS)
def test_an_overflow_on_one_rank_lowers_the_scale_of_all(
    world: int, ran_on: Backend, scaler: str
) -> None:
    case = Case("AdamW", "wrapper")
    net = network(case, seed=1)
    optimizer = case.optimizer(net)
    torchs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    scales = []
    for step in range(SCALED_STEPS):
        scale_up(net, torchs.get_scale(), step, rank=1)
        torchs.scale(torch.ones(()))
        torchs.step(optimizer)
        torchs.update()
        scales.append(torchs.get_scale())
    ranks = [rank[scaler] for rank in found(world, ran_on, "scaled")]
    for rank in ranks:
        assert rank["scales"] == scales
    result = joined(ranks)
    skips = sum(map(spoilt, range(SCALED_STEPS)))
    assert result["groups"][0]["skipped_steps"] == skips
    assert_same_bits(
        {key: result[key] for key in result if key != "scales"}, contents(net, optimizer)
    )


def test_an_overflow_in_one_stage_lowers_the_scale_of_all(world: int, ran_on: Backend) -> None:
    ranks = found(world, ran_on, "stages_scaled")
    for rank in ranks:
        assert rank["scales"] == ranks[0]["scales"]
        assert rank["scales"][0] == 2.0**15
        assert rank["skipped"] == sum(map(spoilt, range(SCALED_STEPS)))


def test_a_warm_up_from_nothing_is_a_step_on_all(world: int, ran_on: Backend) -> None:
    for rank in found(world, ran_on, "warm_up_from_nothing"):
        assert rank == {"norm": pytest.approx(2**0.5), "rounded": 1}


def test_mixed_precision_of_fully_shard(world: int, ran_on: Backend) -> None:
    layer = product(torch.float32)
    optimizer = sg.optim.AdamW(layer.parameters(), lr=0.1, max_norm=0.25)
    for step in range(4):
        # Sums of these gradients are exact even in bf16.
        (whole_loss(layer, step, world, torch.float32) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in found(world, ran_on, "mixed_precision"):
        assert rank["path"] == "fused"
        assert_same_bits(rank["weight"], layer.weight.detach())


def test_accumulation_and_scaling_under_data_parallelism(world: int, ran_on: Backend) -> None:
    layer = product(torch.float32)
    optimizer = sg.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, max_norm=0.25)
    for step in (0, 2):  # in the other step rank 1's gradient is not finite
        for number in range(MICRO_BATCHES):
            with sg.accumulate(optimizer):
                (whole_loss(layer, 3 * step + number, world, torch.float32) / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in found(world, ran_on, "data_parallel_accumulation"):
        assert rank["norm"] == pytest.approx(float(optimizer.grad_norm), rel=1e-6)
        torch.testing.assert_close(rank["weight"], layer.weight.detach(), rtol=1e-6, atol=1e-6)
        assert rank["skipped"] == 1
        assert rank["scale"] == 2.0**9
