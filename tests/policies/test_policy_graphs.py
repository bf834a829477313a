"""On a GPU, a replayed graph asks the policies and lets them learn, as eager steps do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import BACKENDS, Backend, backend_parameters
from tests.policies.policy_runs import CLIPS, recorded_norms
from tests.policies.python_policies import PYTHON
from tests.snapshots import bits

pytestmark = pytest.mark.parametrize("backend", backend_parameters(BACKENDS[2:]), indirect=True)

NORMS = recorded_norms(60)
CASES = {**CLIPS, **PYTHON}


def made(name: str, backend: Backend) -> tuple[Parameter, Any]:
    param = Parameter(torch.zeros(4, dtype=torch.float64, device=backend.device))
    param.grad = torch.zeros_like(param)
    ours = {"clip": CASES[name].policy(), "skip": sg.SkipSpikes(5.0, window=16)}
    return param, sg.optim.SGD([param], lr=1.0, **ours)


def give(param: Parameter, norm: float) -> None:
    assert param.grad is not None
    param.grad[2].fill_(norm)


def captured(param: Parameter, optimizer: Any, norms: list[float]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for norm in norms:
            give(param, norm)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_graph_learns_as_eager_steps_do(backend: Backend, name: str) -> None:
    (mine, ours), (expected, same) = made(name, backend), made(name, backend)
    graph = captured(mine, ours, NORMS[:3])
    for step, norm in enumerate(NORMS):
        give(expected, norm)
        same.step()
        if step >= 3:
            give(mine, norm)
            graph.replay()
            assert torch.equal(bits(mine), bits(expected))
    assert ours.state_dict()["param_groups"] == same.state_dict()["param_groups"]
    assert ours.skipped_steps > 2


def test_a_loaded_state_reaches_the_graph_with_the_next_step(backend: Backend) -> None:
    param, optimizer = made("zscore", backend)
    graph = captured(param, optimizer, NORMS[:3])
    saved = optimizer.state_dict()
    for norm in NORMS[3:20]:
        give(param, norm)
        graph.replay()
    optimizer.load_state_dict(saved)
    give(param, NORMS[3])
    optimizer.step()
    graph.replay()
    assert optimizer.state_dict()["param_groups"][0]["clip_state"][2] == 5.0
