"""ActivationPenalty against autograd of the penalised loss."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from steadygrad.nn.activation_penalty import ActivationPenalty
from tests.backends import Backend
from tests.tolerances import assert_close, assert_error_at_most_twice_torch

STRENGTHS = [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)]


def penalty(a: Tensor, l1: float, l2: float) -> Tensor:
    return l1 * a.abs().sum() + l2 / 2 * a.square().sum()


@pytest.mark.parametrize(("l1", "l2"), STRENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_penalized_loss(
    backend: Backend, dtype: torch.dtype, l1: float, l2: float
) -> None:
    x = torch.randn(7, 33, dtype=dtype, device=backend.device)
    x[0, :3] = 0.0
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer = ActivationPenalty(l1, l2)
    hidden = ours * 2
    output = layer(hidden)
    assert torch.equal(output, hidden) and output.data_ptr() == hidden.data_ptr()
    output.sin().sum().backward()
    doubled = theirs * 2
    value = penalty(doubled, l1, l2)
    (doubled.sin().sum() + value).backward()
    assert ours.grad is not None
    assert_close(ours.grad, theirs.grad, dtype)
    assert layer.value is not None and layer.value.dtype == torch.float64
    assert_close(layer.value, penalty(doubled.double(), l1, l2).detach(), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.randn(500, dtype=dtype, device=backend.device, requires_grad=True)
    grad = torch.randn(500, dtype=dtype, device=backend.device)
    ActivationPenalty(0.3, 0.7)(x).backward(grad)
    a = x.detach()
    exact = grad.double() + 0.3 * a.double().sign() + 0.7 * a.double()
    assert x.grad is not None
    assert_error_at_most_twice_torch(x.grad, grad + 0.3 * a.sign() + 0.7 * a, exact.cpu())


def test_differentiated_twice() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    layer = ActivationPenalty(0.3, 0.7)

    def second(loss: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    ours = second(layer(x * x).sin().sum())
    theirs = second((x * x).sin().sum() + penalty(x * x, 0.3, 0.7))
    assert_close(ours, theirs, torch.float64)


def test_added_once_for_each_forward() -> None:
    x = torch.ones(3, requires_grad=True)
    output = ActivationPenalty(l2=0.5)(x * 1)
    output.sum().backward(retain_graph=True)
    output.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.5] * 3


def test_the_value_before_backward_and_without() -> None:
    layer = ActivationPenalty(l1=2.0)
    assert layer.value is None
    x = torch.ones(3, requires_grad=True)
    output = layer(x * 1)
    assert layer.value is not None and layer.value.item() == 6.0
    output.sum().backward()
    assert layer.value.item() == 6.0
    layer = ActivationPenalty(l1=2.0)
    layer(x * 1)
    assert layer.value is None, "nothing is kept for those who may ask"


def test_checkpointing_keeps_the_value() -> None:
    layer = ActivationPenalty(l1=2.0)
    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(
        lambda h: layer(h * 1), x, use_reentrant=False
    ).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [3.0] * 3
    assert layer.value is not None and layer.value.item() == 6.0


def test_only_in_training_and_where_gradients_flow() -> None:
    layer = ActivationPenalty(1.0, 1.0)
    x = torch.randn(3)
    assert layer(x) is x
    x.requires_grad_()
    with torch.no_grad():
        assert layer(x) is x
    assert layer.eval()(x) is x
    assert ActivationPenalty()(x) is x
    assert layer.value is None


@pytest.mark.parametrize("make", [lambda x: x.expand(4, 5), lambda x: x.t(), lambda x: x[:, ::2]])
def test_any_strides(make: object) -> None:
    x = torch.randn(1, 5, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ActivationPenalty(0.3, 0.7)(make(ours * 2)).sum().backward()
    a = make(theirs * 2)
    (a.sum() + penalty(a, 0.3, 0.7)).backward()
    assert_close(ours.grad, theirs.grad, torch.float64)


def test_empty_input() -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    ActivationPenalty(1.0, 1.0)(x * 1).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 3)


def test_an_overwritten_input_is_an_error() -> None:
    x = torch.randn(3, requires_grad=True)
    hidden = x * 1
    output = ActivationPenalty(l2=1.0)(hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        output.sum().backward()


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 4), ActivationPenalty(l1=0.5), nn.Linear(4, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(3, 4)).sum()
    loss.backward()
    assert model[0].weight.grad.dtype == torch.float32
    assert model[1].value is not None and model[1].value > 0


# torch's own tracer instantiates a deprecated class.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_as_one_graph() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), ActivationPenalty(0.3, 0.7), nn.Tanh()).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x).sum().backward()
    expected, value = model[0].weight.grad.clone(), model[1].value
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert_close(model[0].weight.grad, expected, torch.float64)
    assert model[1].value is not value
    assert_close(model[1].value, value, torch.float64)


def test_copies_and_pickles() -> None:
    layer = ActivationPenalty(0.5, 0.25)
    layer(torch.ones(2, requires_grad=True) * 1).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.l1, twin.l2, twin.value) == (0.5, 0.25, None)
    assert repr(layer) == "ActivationPenalty(l1=0.5, l2=0.25)"
    assert layer.state_dict() == {}


@pytest.mark.parametrize("value", [-0.5, math.nan, -math.inf])
@pytest.mark.parametrize("name", ["l1", "l2"])
def test_negative_and_nan_weights_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"ActivationPenalty: {name}: expected .* got {value}"):
        ActivationPenalty(**{name: value})


def test_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="ActivationPenalty: l1: expected a number, got list"):
        ActivationPenalty(l1=[1.0])
