"""Calls that are refused, with which error and without any change; and calls that are left to torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steadygrad as sg
from tests.backends import Backend
from tests.nn.batch_norm_modules import Pair

batch_norm = sg.nn.functional.batch_norm


class Numbers(Tensor):
    """A subclass of Tensor, which the kernels leave to torch."""


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (4, 5, 3, 3)).to(dtype)


# Inputs of a module for 5 channels, the error, and what the message says.
REFUSED_BY_BOTH: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "channels": (lambda: image(4, 6, 3, 3), RuntimeError, "expected 6 elements.* got 5"),
    "rank 3": (lambda: image(4, 5, 3), ValueError, "4D input"),
    "rank 5": (lambda: image(4, 5, 3, 3, 3), ValueError, "4D input"),
    "one value": (
        lambda: image(1, 5, 1, 1),
        ValueError,
        r"more than 1 value per channel.*\[1, 5, 1, 1\]",
    ),
    "dtype": (lambda: image(dtype=torch.float64), RuntimeError, "dtype"),
    "int": (lambda: image(dtype=torch.int32), NotImplementedError, "not implemented"),
    "complex": (lambda: image(dtype=torch.complex64), NotImplementedError, "not implemented"),
    "sparse": (lambda: image().to_sparse(), NotImplementedError, "Sparse"),
    "device": (lambda: image().to("meta"), RuntimeError, "device"),
}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.once
@pytest.mark.parametrize("case", REFUSED_BY_BOTH)
def test_refused_as_by_torch(backend: Backend, case: str) -> None:
    make, error, message = REFUSED_BY_BOTH[case]
    pair = Pair(2, device=backend.device, dtype=torch.float32)
    x = make() if case == "device" else make().to(backend.device)
    with pytest.raises(error):
        pair.theirs(x)
    before = state(pair.ours)
    with pytest.raises(error, match=message):
        pair.ours(x)
    assert_unchanged(pair.ours, before)


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.once
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan")])
def test_eps(backend: Backend, eps: float, training: bool) -> None:
    """Refuse eps that is not positive; 0 is allowed with given statistics, and torch accepts even NaN."""
    module = sg.nn.BatchNorm2d(5, eps=eps, device=backend.device).train(training)
    before = state(module)
    x = image().to(backend.device)
    if eps == 0 and not training:
        theirs = nn.BatchNorm2d(5, eps=eps, device=backend.device).eval()
        torch.testing.assert_close(module(x), theirs(x))
        return
    with pytest.raises(ValueError, match=r"eps: expected a number that is .*, got"):
        module(x)
    assert_unchanged(module, before)


# Residuals for an input of shape (4, 5, 3, 3).
RESIDUALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "shape": (lambda: image(4, 5, 3, 2), RuntimeError, r"shape \(4, 5, 3, 3\), got \(4, 5, 3, 2\)"),
    "broadcast": (lambda: image(1, 5, 1, 1), RuntimeError, "shape"),
    "rank": (lambda: image(4, 5, 9), RuntimeError, "shape"),
    "dtype": (
        lambda: image(dtype=torch.bfloat16),
        TypeError,
        "dtype torch.float32, got torch.bfloat16",
    ),
    "sparse": (lambda: image().to_sparse(), TypeError, "strided tensor, got torch.sparse_coo"),
    "device": (lambda: image().to("meta"), RuntimeError, "device .*, got meta"),
    "number": (lambda: 1.0, TypeError, "expected a torch.Tensor or None, got float"),
}


@pytest.mark.once
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", RESIDUALS)
def test_residuals(backend: Backend, case: str, training: bool) -> None:
    make, error, message = RESIDUALS[case]
    residual = make()
    if isinstance(residual, Tensor) and case != "device":
        residual = residual.to(backend.device)
    module = sg.nn.BatchNorm2d(5, activation="relu", device=backend.device).train(training)
    before = state(module)
    for requires_grad in (False, True):
        x = image().to(backend.device).requires_grad_(requires_grad)
        with pytest.raises(error, match=f"batch_norm: residual: expected .*{message}|{message}"):
            module(x, residual)
    assert_unchanged(module, before)


@pytest.mark.once
@pytest.mark.parametrize("activation", ["gelu", "ReLU", "", 1, nn.ReLU()])
def test_activations(backend: Backend, activation: Any) -> None:
    with pytest.raises(ValueError, match="activation: expected 'relu', 'relu6' or None, got"):
        sg.nn.BatchNorm2d(5, activation=activation)
    with pytest.raises(ValueError, match="activation: expected 'relu', 'relu6' or None, got"):
        batch_norm(image().to(backend.device), None, None, training=True, activation=activation)


def test_unknown_options_of_the_constructor() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        sg.nn.BatchNorm2d(5, nonsense=True)
    with pytest.raises(TypeError):
        sg.nn.BatchNorm2d()


# Calls of the functional form that torch refuses with the same type of error.
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one dimension": (lambda f: f(image(5), torch.zeros(5), torch.ones(5)), "dimensions"),
    "no statistics": (lambda f: f(image(), None, None), "running_mean must be defined"),
    "no variance": (lambda f: f(image(), torch.zeros(5), None), "running_var must be defined"),
    "mean alone": (
        lambda f: f(image(), torch.zeros(5), None, training=True),
        "both be None",
    ),
    "weight": (
        lambda f: f(image(), None, None, torch.ones(4), training=True),
        "weight: expected 5 elements, one for each channel of the input, got 4",
    ),
    "bias": (
        lambda f: f(image(), None, None, None, torch.ones(6), training=True),
        "bias: expected 5 elements.*got 6",
    ),
    "running_var": (
        lambda f: f(image(), torch.zeros(5), torch.ones(4), training=True),
        "running_var: expected 5 elements",
    ),
    "gradient of statistics": (
        lambda f: f(image(), torch.zeros(5, requires_grad=True), torch.ones(5), training=True),
        "not differentiable",
    ),
    "no momentum": (
        lambda f: f(image(), torch.zeros(5), torch.ones(5), training=True, momentum=None),
        "momentum",
    ),
    "weight of another kind": (
        lambda f: f(image(), None, None, [1.0] * 5, training=True),
        "Tensor",
    ),
    "one value": (lambda f: f(image(1, 5), None, None, training=True), "more than 1 value"),
    "float64 weight": (
        lambda f: f(image(), None, None, torch.ones(5, dtype=torch.float64), training=True),
        "dtype",
    ),
    "half weight": (
        lambda f: f(image(), None, None, torch.ones(5, dtype=torch.float16), training=True),
        "dtype",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_functional_form_refuses_as_torch(case: str) -> None:
    call, message = CALLS[case]
    with pytest.raises(Exception) as theirs:
        call(F.batch_norm)
    with pytest.raises(type(theirs.value), match=message):
        call(batch_norm)


def test_input_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"input: expected a torch\.Tensor, got list"):
        batch_norm([1.0], None, None, training=True)


def test_process_group_needs_kernels() -> None:
    module = sg.nn.BatchNorm2d(5, process_group=object())
    before = state(module)
    with pytest.raises(TypeError, match="process_group: expected tensors that the kernels take"):
        module(image().as_subclass(Numbers))
    assert_unchanged(module, before)


# --- what is left to torch ---


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_subclasses_of_tensors(training: bool, momentum: float | None) -> None:
    pair = Pair(2, fusion="add+relu", momentum=momentum).train(training)
    x, r = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64)
    got = pair.ours(x.as_subclass(Numbers), r.as_subclass(Numbers))
    assert type(got) is Numbers
    torch.testing.assert_close(got.as_subclass(Tensor), pair.torch_call(x, r))
    torch.testing.assert_close(dict(pair.ours.state_dict()), dict(pair.theirs.state_dict()))


def test_meta_tensors() -> None:
    module = sg.nn.BatchNorm2d(5, activation="relu", device="meta")
    x = torch.empty(4, 5, 3, 3, device="meta", requires_grad=True)
    output = module(x, x)
    assert output.shape == x.shape and output.is_meta
    output.sum().backward()
    assert x.grad is not None and x.grad.is_meta


def test_strided_statistics_and_odd_shapes(backend: Backend) -> None:
    """Use statistics of odd shapes: torch looks only at their number of elements."""
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=backend.device)
    numbers = torch.rand(4, 10, dtype=torch.float64, device=backend.device)
    ours, theirs = numbers.clone()[:, ::2], numbers.clone()[:, ::2]
    got = batch_norm(x, ours[0], ours[1], ours[2], ours[3], True)
    want = F.batch_norm(x, theirs[0], theirs[1], theirs[2], theirs[3], True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours, theirs)
    column = numbers[0, :5, None]
    torch.testing.assert_close(
        batch_norm(x, None, None, column, column, True),
        F.batch_norm(x, None, None, column, column, True),
    )


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_transforms(backend: Backend) -> None:
    """Use ``torch.func`` and forward-mode derivatives."""
    module = sg.nn.BatchNorm1d(5, activation="relu", dtype=torch.float64, device=backend.device)
    module.eval()
    x, t = torch.randn(2, 6, 5, dtype=torch.float64, device=backend.device)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    got = torch.func.grad(lambda x: module(x).square().sum())(x)
    torch.testing.assert_close(got, want)
    (along,) = (want * t).sum().reshape(1)
    _, derivative = torch.func.jvp(lambda x: module(x).square().sum(), (x,), (t,))
    torch.testing.assert_close(derivative, along)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        tangent = torch.autograd.forward_ad.unpack_dual(module(dual).square().sum()).tangent
    torch.testing.assert_close(tangent, along)
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(
        torch.func.vmap(module)(several), torch.stack([module(x), module(2 * x)])
    )


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_records_torchs_operation() -> None:
    module = sg.nn.BatchNorm2d(5, activation="relu").eval()
    x = image()
    traced = torch.jit.trace(module, x)
    other = image()
    torch.testing.assert_close(traced(other), module(other))


def test_refused_after_a_good_call(backend: Backend) -> None:
    """Check that a module goes on after a refusal in the middle of training as if nothing had happened."""
    module = sg.nn.BatchNorm2d(5, device=backend.device)
    other = copy.deepcopy(module)
    x = image().to(backend.device)
    module(x)
    with pytest.raises(RuntimeError):
        module(image(4, 6, 3, 3).to(backend.device))
    assert torch.equal(module(x), [other(x), other(x)][1])
    torch.testing.assert_close(dict(module.state_dict()), dict(other.state_dict()))
