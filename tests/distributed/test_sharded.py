"""Training over two and four ranks that share parameters, against one process with torch's clip and optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import ranks as processes
from tests.backends import BACKENDS
from tests.distributed.sharded_cases import CASES, EMULATED_CASES, Case, expected
from tests.ranks import Found

RANK = Path(__file__).with_name("sharded_rank.py")
TIME_LIMIT = (
    180  # seconds for all that the ranks of one world run; a third of it where nothing else runs
)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def found(world: int, name: str) -> Found:
    return processes.found(RANK, world, TIME_LIMIT, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_train_as_one_process_does(case: Case) -> None:
    assert_trains_as_one_process(case)


@pytest.mark.parametrize("case", EMULATED_CASES, ids=str)
def test_ranks_on_a_device_that_the_host_does_not_wait_for(case: Case) -> None:
    why_not = next(b for b in BACKENDS if b.name == "emulated").why_not()
    if why_not is not None:
        pytest.skip(why_not)
    assert_trains_as_one_process(case)


def assert_trains_as_one_process(case: Case) -> None:
    one = expected(case)
    ranks = found(case.world, str(case))
    assert max(one.norms) > 100 * min(one.norms)  # the run has spikes
    for rank in ranks:
        torch.testing.assert_close(rank["norms"], one.norms, rtol=1e-5, atol=0)
        assert rank["norms"] == ranks[0]["norms"]  # all ranks have the same bits
        for actual, exact in zip(rank["weights"], one.weights, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)
        assert rank["skipped"] == 0
        assert rank["clipped"] == ranks[0]["clipped"] > 0
        fused = case.rule != "adadelta"
        assert rank["path"].startswith("fused" if fused else "in-place: no fused rule for Adadelta")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_collective_a_step(case: Case) -> None:
    """Allow one collective, whatever the number of meshes: a sum, or a gather for norms that are not sums."""
    name = "allreduce_" if case.p in (1, 2) else "allgather"
    for rank in found(case.world, str(case)):
        assert sum(rank["collectives"].values()) == 1
        (collective,) = rank["collectives"]
        assert name in collective


def test_state_is_laid_out_as_torch_has_it() -> None:
    for rank in found(2, "cpu-fsdp-2-adamw-global-2"):
        for state in rank["state"]:
            assert state == {"step": "Tensor", "exp_avg": "DTensor", "exp_avg_sq": "DTensor"}
    for rank in found(2, "cpu-tensors-2-adamw-global-2-l2"):
        for kind, state in zip(rank["types"], rank["state"], strict=True):
            assert state["exp_avg"] == ("DTensor" if kind == "DTensor" else "Tensor")


def test_replicas_stay_replicas() -> None:
    """Check that plain parameters, and parameters replicated over a mesh, have the same bits on all ranks."""
    for world in (2, 4):
        ranks = found(world, f"cpu-tensors-{world}-adamw-global-2-l2")
        for i in (4, 5, 6) if world == 4 else (3, 4, 6):
            for rank in ranks:
                assert torch.equal(rank["locals"][i], ranks[0]["locals"][i])
