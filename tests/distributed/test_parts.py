"""``ZeroRedundancyOptimizer`` and FSDP1, whose ranks hold parts of a whole that are not DTensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import found

SCRIPT = Path(__file__).with_name("parts_rank.py")
TIME_LIMIT = 90.0


@pytest.mark.parametrize("case", ["", " reduce_norm", " options", " few", " wrapper"])
def test_zero_redundancy_optimizer_clips_by_the_norm_over_its_ranks_and_can_be_saved(
    case: str,
) -> None:
    results = found(SCRIPT, 2, TIME_LIMIT, f"zero{case}")
    for result in results:
        assert result["off"] < 1e-6
        assert result["norm off"] < 1e-4
        assert result["clipped"] >= 3
    layers = 1 if case == " few" else 3
    assert sum(result["held"] for result in results) == layers
    assert results[0]["saved"] == layers


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_fsdp1_is_refused_with_the_line_to_write(strategy: str, use_orig_params: bool) -> None:
    for result in found(SCRIPT, 2, TIME_LIMIT, f"fsdp1 {strategy} {use_orig_params}"):
        for way in ("default", "wrapped"):
            assert "step: param_groups[0]['params'][0]: expected reduce_norm=" in result[way]
            assert "reduce_norm=[None]" in result[way]
        for way in ("tensor", "adaptive"):
            assert "expected clip_scope='global' or 'group'" in result[way]
        assert "sg.distributed.reduce_norm(norm, model.process_group)" in result["function"]
        assert result["unchanged"]
        assert result["norm off"] < 1e-4
