"""Two ranks that reduce their norms learn the same as one process with all parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import steadygrad as sg
from tests.policies.policy_rank import BACKENDS_RUN, CASES, NAMES, norms_of
from tests.policies.policy_runs import Driven
from tests.ranks import found

SCRIPT = Path(__file__).with_name("policy_rank.py")
TIME_LIMIT = 90.0


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend_name", [backend.name for backend in BACKENDS_RUN])
def test_ranks_learn_what_one_process_learns(backend_name: str, name: str, scope: Any) -> None:
    first, second = found(SCRIPT, 2, TIME_LIMIT, f"{backend_name}-{name}-{scope}")
    assert first["learnt"] == second["learnt"]
    # Each rank counts the clips of groups in which it has gradients.
    same = slice(1) if scope == "group" else slice(2)
    assert first["counts"][same] == second["counts"][same]
    # There are two groups again, the first one with a parameter of each rank.
    one = Driven(
        3,
        torch.device("cpu"),
        lambda groups, **options: in_two(groups, **options),
        **{
            "clip": CASES[name].policy(),
            "skip": sg.SkipSpikes(5.0, window=16),
            "clip_scope": scope,
        },
    )
    for step, ((a, b), (c, _)) in enumerate(zip(norms_of(0), norms_of(1), strict=True)):
        whole = one.step(a, b, c)
        got = [*first["taken"][step], second["taken"][step][0]]
        assert all(math.isclose(g, w, rel_tol=1e-9) for g, w in zip(got, whole, strict=True))
    assert one.optimizer.skipped_steps == first["counts"][0] > 3


@pytest.mark.parametrize("backend_name", [backend.name for backend in BACKENDS_RUN])
def test_a_policy_that_raises_on_one_rank_refuses_the_step_on_all(backend_name: str) -> None:
    results = found(SCRIPT, 2, TIME_LIMIT, f"{backend_name}-raising")
    for rank, result in enumerate(results):
        first, second, third = result["raised"]
        assert first == third == "nothing"
        assert ("no space left" if rank == 1 else "got an exception on another rank") in second
        assert torch.equal(result["values"][0], result["values"][1])
        assert result["clipped"] == 2
    for one, other in zip(results[0]["values"], results[1]["values"], strict=True):
        assert torch.equal(one, other)


def in_two(groups: Any, **options: Any) -> Any:
    """Return two groups, with the third parameter in the first one."""
    first, second, third = (group["params"] for group in groups)
    return sg.optim.SGD([{"params": [*first, *third]}, {"params": second}], **options)
