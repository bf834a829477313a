"""Compares the largest eigenvalue with the exact one, and stable rates with where training diverges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import steadygrad as sg
from tests.examination.networks import Everything, batches, cross_entropy, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def exact(model: nn.Module, batch: Any, scale: Tensor | None = None) -> float:
    """Return the largest eigenvalue of the Hessian, computed exactly in float64."""
    model = model.double()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        given = {n: x.view(s) for (n, s), x in zip(shapes.items(), parts, strict=True)}
        return cross_entropy(functional_call(model, given, batch[0].double()), batch[1])

    hessian = torch.autograd.functional.hessian(loss, flat)
    if scale is not None:
        hessian = scale[:, None] * hessian * scale
    return float(torch.linalg.eigvalsh(hessian)[-1])


NETWORKS = {
    "relu": lambda: mlp(4, width=8),
    "too large": lambda: mlp(6, gain=1.5, width=8),
    "tanh": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("network", NETWORKS)
def test_within_five_percent_of_the_exact_one(network: str, seed: int) -> None:
    torch.manual_seed(seed)
    model, batch = NETWORKS[network](), batches(1, size=8, examples=32)[0]
    found = sg.examine(model, cross_entropy, [batch]).sharpness
    assert found == pytest.approx(exact(model, batch), rel=0.05)


class Quadratic(nn.Module):
    """Computes ``sum(curvature * p^2) / 2``."""

    def __init__(self, curvature: list[float]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(len(curvature)))
        self.curvature = torch.tensor(curvature)

    def forward(self, x: Tensor) -> Tensor:
        return (self.curvature * self.p.square()).sum() / 2


def quadratic_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(batch)
    return loss


def diverges(model: nn.Module, make: Any, lr: float, steps: int = 3000) -> bool:
    optimizer = make(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = quadratic_loss(model, None)
        loss.backward()
        optimizer.step()
        if loss > 1e6:
            return True
    return False


SGD = torch.optim.SGD
OPTIMIZERS = {
    "plain": SGD,
    "momentum": lambda p, lr: SGD(p, lr, momentum=0.9),
    "nesterov": lambda p, lr: SGD(p, lr, momentum=0.9, nesterov=True),
    "dampening": lambda p, lr: SGD(p, lr, momentum=0.9, dampening=0.5),
    "stabilized": lambda p, lr: sg.Stabilizer(SGD(p, lr, momentum=0.9), max_norm=math.inf),
    "two rates": lambda p, lr: SGD([{"params": list(p), "lr": 2 * lr}], lr),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_descent_diverges_above_the_largest_stable_rate(name: str) -> None:
    curvature = [100.0, 30.0, 1.0, -2e-4]
    model = Quadratic(curvature)
    optimizer = OPTIMIZERS[name](model.parameters(), 1e-3)
    stable = sg.examine(model, quadratic_loss, [0], optimizer=optimizer).largest_stable_lr
    if name == "two rates":
        stable /= 2  # the limit of that group
    assert not diverges(Quadratic(curvature), OPTIMIZERS[name], 0.97 * stable)
    assert diverges(Quadratic(curvature), OPTIMIZERS[name], 1.03 * stable)


def test_without_curvature_every_rate_is_stable() -> None:
    model = nn.Linear(3, 1)
    found = sg.examine(model, lambda model, batch: model(batch).sum(), [torch.ones(2, 3)])
    assert found.sharpness == 0 and found.largest_stable_lr == math.inf


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("make", [torch.optim.Adam, sg.optim.AdamW, torch.optim.RMSprop])
def test_the_sharpness_of_adam_is_the_preconditioned_one(make: Any, steps: int) -> None:
    model, batch = mlp(3, width=8), batches(1, size=8)[0]
    optimizer = make(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    found = sg.examine(model, cross_entropy, [batch], optimizer=optimizer)
    grads = torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
    moments = []
    for p, grad in zip(model.parameters(), grads, strict=True):
        state = optimizer.state.get(p, {})
        key = "square_avg" if make is torch.optim.RMSprop else "exp_avg_sq"
        moment = state[key] if steps else grad.square()
        if steps and make is not torch.optim.RMSprop:
            moment = moment / (1 - 0.999**steps)
        moments.append(moment.double().sqrt().reshape(-1) + 1e-8)
    scale = torch.cat(moments).rsqrt()
    assert found.sharpness == pytest.approx(exact(model, batch, scale), rel=0.05)
    product = 2.0 if make is torch.optim.RMSprop else 38.0
    assert found.largest_stable_lr == pytest.approx(product / found.sharpness)


def test_optimizers_nobody_knows_the_stable_rate_of() -> None:
    model = mlp(3)
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)
    found = sg.examine(model, cross_entropy, batches(1), optimizer=optimizer)
    assert found.sharpness > 0 and math.isnan(found.largest_stable_lr)
    assert "nan" not in str(found).partition("\n\n")[0]


def test_recurrent_layers_attention_and_batch_norm_are_differentiated_twice() -> None:
    found = sg.examine(Everything(), cross_entropy, batches(2))
    assert found.sharpness > 0 and found.why_no_sharpness == ""


def test_it_is_left_out_when_asked_or_not_implemented() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Once.apply(self.linear(x))
            return out

    found = sg.examine(Net(), cross_entropy, batches(1))
    assert math.isnan(found.sharpness) and math.isnan(found.largest_stable_lr)
    assert "once_differentiable" in found.why_no_sharpness
    assert "left out: " in str(found)
    found = sg.examine(mlp(), cross_entropy, batches(1), sharpness=False)
    assert math.isnan(found.largest_stable_lr) and "sharpness=False" in str(found)
