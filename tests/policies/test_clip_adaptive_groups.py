"""Which param groups are clipped by output unit: with new wrappers, and if gradients have no units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend


def body_and_head() -> list[dict[str, Any]]:
    body, head = nn.Linear(3, 3), nn.Linear(3, 2)
    return [{"params": list(body.parameters())}, {"params": list(head.parameters())}]


def clippings(optimizer: Any) -> list[float | None]:
    return [group["clipping"] for group in optimizer.param_groups]


def test_a_wrapper_made_anew_follows_its_own_number() -> None:
    groups = body_and_head()
    inner = torch.optim.SGD([groups[0], {**groups[1], "clipping": None}], lr=0.1)
    sg.Stabilizer(inner, clip=sg.ClipAdaptive(0.5))
    assert clippings(inner) == [0.5, None]
    sg.Stabilizer(inner, clip=sg.ClipAdaptive(0.01))
    assert clippings(inner) == [0.01, None]
    sg.Stabilizer(inner, max_norm=1.0)
    sg.Stabilizer(inner, clip=sg.ClipAdaptive(0.02))
    assert clippings(inner) == [0.02, None]


def test_a_wrapper_around_a_loaded_checkpoint() -> None:
    groups = body_and_head()
    saved = sg.Stabilizer(
        torch.optim.SGD([groups[0], {**groups[1], "clipping": None}], lr=0.1),
        clip=sg.ClipAdaptive(0.5),
    ).state_dict()
    inner = torch.optim.SGD(body_and_head(), lr=0.1)
    inner.load_state_dict(saved)
    assert clippings(sg.Stabilizer(inner, clip=sg.ClipAdaptive(0.01))) == [0.01, None]


def test_a_group_keeps_its_own_number_in_its_first_wrapper() -> None:
    groups = body_and_head()
    inner = torch.optim.SGD([groups[0], {**groups[1], "clipping": 0.25}], lr=0.1)
    assert clippings(sg.Stabilizer(inner, clip=sg.ClipAdaptive(0.5))) == [0.5, 0.25]


def sparse(device: torch.device) -> Parameter:
    """Return a parameter whose sparse gradient has the rows (3, 4) and twice (6, 8)."""
    param = Parameter(torch.ones(3, 2, device=device))
    param.grad = torch.sparse_coo_tensor(
        [[0, 2, 2]],
        [[3.0, 4.0], [6.0, 8.0], [6.0, 8.0]],
        (3, 2),
        device=device,
        check_invariants=True,
    )
    return param


def whole(device: torch.device) -> Parameter:
    """Return a complex parameter."""
    param = Parameter(torch.ones(3, 2, dtype=torch.complex64, device=device))
    param.grad = torch.full_like(param, 3 + 4j)
    return param


def dense(device: torch.device) -> Parameter:
    """Return a parameter of one row of norm 5, whose gradient has norm 10."""
    param = Parameter(torch.tensor([[3.0, 4.0]], device=device))
    param.grad = torch.tensor([[6.0, 8.0]], device=device)
    return param


def move(param: Parameter, before: Tensor) -> Tensor:
    return (before - param.detach()).cpu()


@pytest.mark.parametrize("make", [sparse, whole], ids=["sparse", "complex"])
def test_gradients_without_units_are_left_out_with_their_group(backend: Backend, make: Any) -> None:
    clipped, other = dense(backend.device), make(backend.device)
    before = [param.detach().clone() for param in (clipped, other)]
    wanted = other.grad.to_dense().cpu().clone()
    optimizer = sg.Stabilizer(
        torch.optim.SGD([{"params": [clipped]}, {"params": [other], "clipping": None}], lr=1.0),
        clip=sg.ClipAdaptive(0.1),
        telemetry="tensor",
    )
    optimizer.step()
    assert torch.allclose(move(clipped, before[0]), torch.tensor([[0.3, 0.4]]))
    assert torch.allclose(move(other, before[1]), wanted)
    assert optimizer.clipped_steps == 1
    history = optimizer.telemetry
    assert history is not None and history.tensor_norms is not None
    norms = [10.0, float(np.linalg.norm(wanted.numpy()))]
    assert np.allclose(history.tensor_norms[0], norms)
    # The limit of the norm applies all the same.
    optimizer.param_groups[1]["max_norm"] = optimizer.param_groups[0]["max_norm"] = 1.0
    optimizer.step()
    assert optimizer.clipped_steps == 2


def test_gradients_without_units_where_units_are_clipped(backend: Backend) -> None:
    def step(param: Parameter) -> None:
        sg.Stabilizer(torch.optim.SGD([param], lr=1.0), clip=sg.ClipAdaptive()).step()

    with pytest.raises(
        TypeError,
        match=r"step: clip: ClipAdaptive: expected dense gradients.*got a sparse one of shape \(3, 2\).*clipping=None",
    ):
        step(sparse(backend.device))
    with pytest.raises(
        TypeError, match=r"step: parameters\[0\]: expected a real tensor, as complex ones cannot"
    ):
        step(whole(backend.device))


def test_what_telemetry_says_of_units() -> None:
    param = dense(torch.device("cpu"))
    optimizer = sg.optim.SGD([param], lr=0.0, clip=sg.ClipAdaptive(0.1), telemetry="global")
    optimizer.step()
    param.grad = torch.tensor([[0.03, 0.04]])
    optimizer.step()
    history = optimizer.telemetry
    assert history is not None
    assert np.isnan(history.limit).all()
    assert np.allclose(history.clipped_norm, [np.nan, 0.05], equal_nan=True)
