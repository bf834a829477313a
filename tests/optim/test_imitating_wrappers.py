"""Wrappers that only imitate an optimizer's class show what the optimizer itself knows."""

from __future__ import annotations

from typing import Any

import pytest

import steadygrad as sg
from tests.backends import Backend
from tests.optim.optimizer_kinds import MAKERS, give
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import assert_same_tree


class Imitation:
    """Imitates the class of the optimizer that it wraps, as those of Lightning and its Fabric do."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.__class__ = type("Imitation", (Imitation, type(optimizer)), {})

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


@pytest.mark.parametrize("kind", MAKERS)
def test_it_knows_what_the_optimizer_knows(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, clip=sg.ClipZScore(warmup=2))
    imitation: Any = Imitation(optimizer)
    assert isinstance(imitation, type(optimizer))
    for seed in range(3):
        give(params, seed)
        imitation.step()
    assert imitation.grad_norm is not None and imitation.grad_norm == optimizer.grad_norm
    assert imitation.path == optimizer.path
    assert imitation.accumulated is optimizer.accumulated
    saved = imitation.state_dict()
    assert saved["param_groups"][0]["clip_state"] is not None
    assert_same_tree(saved, optimizer.state_dict())
    optimizer.load_state_dict(saved)
    give(params, 3, element=float("nan"))
    imitation.step()
    assert imitation.skipped_steps == optimizer.skipped_steps == 1
    imitation.zero_grad()
    assert all(param.grad is None for param in params)
