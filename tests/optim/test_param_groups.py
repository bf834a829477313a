"""param_groups puts weights into the penalised group, and biases and norm-layer parameters into the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import steadygrad as sg
from tests.backends import Backend


class Net(nn.Module):
    """A network with one layer of each kind, a bare parameter and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.embedding = nn.Embedding(5, 6)
        self.layer = nn.LayerNorm(6)
        self.rms = nn.RMSNorm(6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5, bias=False))
        self.rnn = nn.GRU(6, 2)
        self.attention = nn.MultiheadAttention(6, 2)
        self.scale = nn.Parameter(torch.ones(6, 6))
        self.head = nn.Linear(6, 5)
        self.head.weight = self.embedding.weight


NORMS = ("batch.", "group.", "instance.", "layer.", "rms.")


def names(model: nn.Module, params: list[nn.Parameter]) -> set[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in params}


def options(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def test_two_groups_that_hold_every_parameter_once(backend: Backend) -> None:
    model = Net().to(backend.device)
    groups = sg.param_groups(model, l1=1e-4, l2=1e-3, weight_decay=1e-2)
    assert len(groups) == 2
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(p) for p in model.parameters()}


def test_biases_and_norm_parameters_are_spared(backend: Backend) -> None:
    model = Net().to(backend.device)
    decayed, spared = sg.param_groups(model, l1=1e-4, l2=1e-3, weight_decay=1e-2)
    want = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(NORMS) or "bias" in name.rsplit(".", 1)[-1]
    }
    assert names(model, spared["params"]) == want
    assert options(decayed) == {
        "l1": 1e-4,
        "l2": 1e-3,
        "weight_decay": 1e-2,
    }
    assert options(spared) == {
        "l1": 0.0,
        "l2": 0.0,
        "weight_decay": 0.0,
    }


@pytest.mark.parametrize("given", [{}, {"l1": 0.1}, {"weight_decay": 0.1}, {"l1": 0.0, "l2": 2.0}])
def test_only_the_given_options_are_keys(backend: Backend, given: dict[str, float]) -> None:
    decayed, spared = sg.param_groups(Net().to(backend.device), **given)
    assert options(decayed) == given
    assert options(spared) == dict.fromkeys(given, 0.0)


def test_a_torch_optimizer_and_a_stabilizer_take_them(backend: Backend) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).to(backend.device)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(2.0)
            param.grad = torch.zeros_like(param)
    torch.optim.SGD(sg.param_groups(model, weight_decay=0.5), lr=0.1).step()
    weight, *rest = model.parameters()
    assert torch.all(weight == 2.0 - 0.1 * 0.5 * 2.0)
    assert all(torch.all(p == 2.0) for p in rest)
    groups = sg.param_groups(model, l1=0.25)
    optimizer = sg.Stabilizer(torch.optim.SGD(groups, lr=1.0), l1=7.0)
    assert [group["l1"] for group in optimizer.param_groups] == [0.25, 0.0]
    optimizer.step()
    assert torch.allclose(weight, torch.tensor(1.9 - 0.25))
    assert all(torch.all(p == 2.0) for p in rest)


def test_a_model_without_norms_or_biases(backend: Backend) -> None:
    model = nn.Linear(3, 3, bias=False).to(backend.device)
    decayed, spared = sg.param_groups(model, l1=0.1)
    assert len(decayed["params"]) == 1 and spared["params"] == []
    optimizer = sg.optim.SGD(sg.param_groups(model, l1=0.1), lr=0.1)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert optimizer.path == "fused"
