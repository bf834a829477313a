"""Parameters of a lazy module not initialized yet: steps ignore them until they have gradients, as in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steadygrad as sg
from tests.backends import Backend
from tests.optim import unfused

Make = Callable[[Any], torch.optim.Optimizer]

# For each kind: ours, the path it takes, and torch's that does the same.
KINDS: dict[str, tuple[Make, str, Make]] = {
    "adamw": (
        lambda params: sg.optim.AdamW(params, lr=0.1, telemetry="tensor", clip_scope="tensor"),
        "fused",
        lambda params: torch.optim.AdamW(params, lr=0.1),
    ),
    "sgd": (
        lambda params: sg.optim.SGD(params, lr=0.1, l1=0.0, l1_mode="proximal"),
        "fused",
        lambda params: torch.optim.SGD(params, lr=0.1),
    ),
    "wrapper": (
        lambda params: sg.Stabilizer(torch.optim.RMSprop(params, lr=0.1)),
        "fused",
        lambda params: torch.optim.RMSprop(params, lr=0.1),
    ),
    "in-place": (
        lambda params: sg.Stabilizer(unfused.Adadelta(params), clip_scope="tensor"),
        "in-place: no fused rule for Adadelta",
        lambda params: unfused.Adadelta(params),
    ),
}


def network(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "late": nn.LazyLinear(3)})
    return model.to(dtype)


def train(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    """Train for two steps without the lazy branch and two with it."""
    device = model["used"].weight.device
    for step in range(4):
        optimizer.zero_grad()
        output = model["used"](torch.ones(2, 4, dtype=model["used"].weight.dtype, device=device))
        if step >= 2:
            torch.manual_seed(1)  # the late layer is initialized here
            output = model["late"](output)
        output.square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_pass_over_an_unused_lazy_branch_as_torchs_do(kind: str, backend: Backend) -> None:
    make, path, torchs = KINDS[kind]
    model, plain = network().to(backend.device), network().to(backend.device)
    optimizer = make(list(model.parameters()))
    assert optimizer.path == path
    train(model, optimizer)
    train(plain, torchs(list(plain.parameters())))
    assert optimizer.path == path
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(param, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rounding", ["master", "kahan"])
def test_kept_bits_of_lazy_parameters_begin_with_their_first_gradient(rounding: Any) -> None:
    model = network(torch.bfloat16)
    optimizer = sg.optim.SGD(list(model.parameters()), lr=0.1, rounding=rounding)
    train(model, optimizer)
    assert optimizer.path == "fused"
    assert len(optimizer.state) == 4


def test_param_groups_refuse_what_has_no_dimensions_yet() -> None:
    with pytest.raises(ValueError, match=r"UninitializedParameter at 'late\.weight'.*run a batch"):
        sg.param_groups(network(), l2=0.1)


def test_a_nameless_lazy_parameter_is_told_by_its_place() -> None:
    model = network()
    optimizer = sg.optim.SGD(list(model.parameters()), lr=0.1)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[2\] of no shape yet"):
        optimizer.name_parameters(model["used"].named_parameters())
