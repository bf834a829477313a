"""Tests that an examination refuses bad input by name, and changes nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadygrad as sg
from tests.examination.networks import batches, cross_entropy, mlp

X, Y = batches(1)[0]
SGD = torch.optim.SGD
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no module": ({"model": lambda x: x}, TypeError, "model: expected a torch.nn.Module, got func"),
    "frozen": ({"model": mlp().requires_grad_(False)}, ValueError, "model: .* requires a gradient"),
    "lazy": ({"model": nn.LazyLinear(5)}, ValueError, "model: .* weight is lazy: call the model"),
    "no function": ({"loss_fn": 3}, TypeError, "loss_fn: expected a function, got a int"),
    "losses": (
        {"loss_fn": nn.CrossEntropyLoss(reduction="none")},
        TypeError,
        r"loss_fn: expected a loss of one element, got a tensor of shape \(16,\)",
    ),
    "number": ({"loss_fn": lambda o, t: 1.0}, TypeError, "loss_fn: expected .*, got a float"),
    "no graph": (
        {"loss_fn": lambda o, t: cross_entropy(o.detach(), t)},
        ValueError,
        r"loss_fn: expected a loss that depends on the parameters.*look for detach\(\)",
    ),
    "one batch": (
        {"batches": (X, Y)},
        TypeError,
        r"batches: expected an iterable of \(inputs, targets\), got a tensor of shape \(16, 20\) in it; for one batch "
        r"write \[\(inputs, targets\)\]",
    ),
    "triples": ({"batches": [(X, Y, Y)]}, TypeError, "batches: .* got a tuple of 3 in it"),
    "none": ({"batches": []}, ValueError, "batches: expected at least one, got none"),
    "no optimizer": (
        {"optimizer": 0.1},
        TypeError,
        "optimizer: expected a torch.optim.Optimizer or None, got float",
    ),
    "another": (
        {"optimizer": SGD(mlp().parameters(), 0.1)},
        ValueError,
        "optimizer: expected one for the model's parameters, got another",
    ),
    "at": ({"at": 3}, ValueError, "at: expected 'first_nonfinite' or None, got 3"),
    "all finite": ({"at": "first_nonfinite"}, ValueError, "at: .* got none in batches"),
    "scale": ({"loss_scale": 0.0}, ValueError, "loss_scale: expected a number above 0, got 0.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    changed, error, message = REFUSED[case]
    given: dict[str, Any] = {"model": mlp(), "loss_fn": cross_entropy, "batches": batches(2)}
    given.update(changed)
    before = torch.get_rng_state()
    with pytest.raises(error, match=f"^examine: {message}"):
        sg.examine(**given)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_uses_the_original() -> None:
    model = mlp()

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) + sum(p.square().sum() for p in model.parameters())

    with pytest.raises(
        ValueError, match=r"loss_fn: .* which is a copy, got one that uses the orig"
    ):
        sg.examine(model, penalised, batches(2))


def test_a_model_that_cannot_be_copied() -> None:
    model = mlp()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"model: .*deepcopy can copy, got .* cannot pickle"):
        sg.examine(model, cross_entropy, batches(2))


def test_a_loader_that_is_no_iterable() -> None:
    with pytest.raises(TypeError, match="examine: batches: expected an iterable"):
        sg.examine(mlp(), cross_entropy, 5)  # type: ignore[arg-type]
