"""Gradients against finite differences, of any order, with any subset of them needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import steadygrad as sg
from tests.backends import Backend
from tests.nn.batch_norm_modules import FUSIONS, LAYOUTS, Pair, laid_out

batch_norm = sg.nn.functional.batch_norm
Arguments = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def case(
    backend: Backend,
    fusion: str,
    training: bool,
    affine: bool = True,
    layout: str = "first",
    shape: tuple[int, ...] = (3, 2, 2, 2),
    dtype: torch.dtype = torch.float64,
) -> tuple[Callable[..., Tensor], Arguments]:
    """Return a call as a function of input, residual, weight and bias, and these tensors."""
    activation, adds = FUSIONS[fusion]

    def made(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, device=backend.device).to(dtype)

    channels = shape[1]
    mean, var = made(channels), made(channels).square() + 0.5
    x = laid_out(made(*shape), layout).requires_grad_()
    r = laid_out(made(*shape), layout).requires_grad_() if adds else None
    # Some elements reach the ceiling of ReLU6.
    w = (4 * made(channels)).requires_grad_() if affine else None
    b = made(channels).requires_grad_() if affine else None

    def call(x: Tensor, r: Tensor | None, w: Tensor | None, b: Tensor | None) -> Tensor:
        running = (None, None) if training else (mean, var)
        return batch_norm(x, *running, w, b, training, residual=r, activation=activation)

    return call, (x, r, w, b)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.full
def test_against_finite_differences(
    backend: Backend, fusion: str, layout: str, training: bool, affine: bool
) -> None:
    call, arguments = case(backend, fusion, training, affine, layout)
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(20, 9), (4, 11, 5), (4, 8, 3, 5), (2, 3, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_formula_equals_kernels(
    backend: Backend,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    training: bool,
    fusion: str,
    layout: str,
) -> None:
    """Compare gradients with ``create_graph``, which come from a formula, with the kernels', also at ReLU's bounds."""
    call, arguments = case(backend, fusion, training, True, layout, shape, dtype)
    given = [a for a in arguments if a is not None]
    output = call(*arguments)
    grad = torch.randn_like(output)
    kernels = torch.autograd.grad(output, given, grad, retain_graph=True)
    formula = torch.autograd.grad(output, given, grad, create_graph=True)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(kernels, formula, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want.detach(), rtol=near, atol=4 * near)


def test_third_order(backend: Backend) -> None:
    call, (x, _, w, b) = case(backend, "relu", True)

    def second(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(call(x, None, w, b).square().sum(), x, create_graph=True)
        return first

    assert gradgradcheck(second, (x, w, b))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_any_part_of_the_gradients(backend: Backend, fusion: str, training: bool) -> None:
    call, arguments = case(backend, fusion, training)
    every = call(*arguments)
    grad = torch.randn_like(every)
    given = [i for i, a in enumerate(arguments) if a is not None]
    want = dict(
        zip(
            given,
            torch.autograd.grad(every, [arguments[i] for i in given], grad),
            strict=True,
        )
    )
    for size in range(1, len(given)):
        for wanted in itertools.combinations(given, size):
            partly = [
                None if a is None else a.detach().requires_grad_(i in wanted)
                for i, a in enumerate(arguments)
            ]
            output = call(*partly)
            got = torch.autograd.grad(output, [partly[i] for i in wanted], grad)
            for i, one in zip(wanted, got, strict=True):
                assert torch.equal(one, want[i])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_strided_and_expanded_gradients(backend: Backend, fusion: str) -> None:
    for layout in ("first", "last"):
        pair = Pair(2, fusion=fusion, device=backend.device)
        x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=backend.device)
        r = torch.randn_like(x) if pair.adds else None
        for of_output in (
            lambda y: y.sum(),
            lambda y: (y[:, :, ::2] ** 2).sum(),
            lambda y: (y.movedim(1, -1).contiguous() ** 2).sum(),
        ):
            grads = []
            for call in (pair.ours, pair.torch_call):
                leaf = laid_out(x, layout).requires_grad_()
                of_output(call(leaf, r)).backward()
                grads.append(leaf.grad)
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("fusion", ["bn", "add+relu"])
def test_batches_of_gradients(backend: Backend, fusion: str, layout: str) -> None:
    """Call backward under vmap, as ``is_grads_batched`` and vectorised jacobians do."""
    call, (x, *others) = case(backend, fusion, True, layout=layout)
    output = call(x, *others)
    grads = torch.randn(3, *output.shape, dtype=output.dtype, device=backend.device)
    (batched,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    by_transform = torch.func.vmap(
        lambda grad: torch.autograd.grad(output, x, grad, retain_graph=True)[0]
    )(grads)
    torch.testing.assert_close(by_transform, batched)
    for grad, got in zip(grads, batched, strict=True):
        (want,) = torch.autograd.grad(output, x, grad, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_same_tensor_twice(backend: Backend) -> None:
    pair = Pair(2, fusion="add+relu", device=backend.device)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=backend.device)
    grads = []
    for call in (pair.ours, pair.torch_call):
        leaf = x.clone().requires_grad_()
        call(leaf, leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


# --- what is kept between forward and backward ---


@pytest.mark.parametrize("which", ["input", "weight"])
def test_changes_of_what_is_kept_are_noticed(backend: Backend, which: str) -> None:
    module = sg.nn.BatchNorm2d(5, device=backend.device)
    x = torch.randn(4, 5, 3, 3, device=backend.device)
    output = module(x)
    with torch.no_grad():
        (x if which == "input" else module.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_changes_of_running_statistics(backend: Backend) -> None:
    """Notice changes after evaluation, which reads the running statistics; training may change them again."""
    module = sg.nn.BatchNorm2d(5, device=backend.device)
    x = torch.randn(4, 5, 3, 3, device=backend.device, requires_grad=True)
    first = module(x)
    module(x)
    first.sum().backward()
    evaluated = module.eval()(x)
    module.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        evaluated.sum().backward()


def test_residual_and_output_may_change(backend: Backend) -> None:
    """Overwrite residual and output before backward, which keeps neither."""
    pair = Pair(2, fusion="add+relu", device=backend.device)
    x, r = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64, device=backend.device)
    leaf = x.clone().requires_grad_()
    overwritten = r.clone()
    output = pair.ours(leaf, overwritten)
    overwritten.zero_()
    output.mul_(2).sum().backward()
    want = x.clone().requires_grad_()
    pair.torch_call(want, r).mul(2).sum().backward()
    torch.testing.assert_close(leaf.grad, want.grad)


@pytest.mark.parametrize(("fusion", "most"), [("bn", 1.0), ("relu", 1.0), ("add+relu", 1 + 1 / 32)])
def test_memory_that_is_kept(backend: Backend, fusion: str, most: float) -> None:
    """Check what is kept: the input, and with ReLU after a residual one bit per element."""
    module = Pair(2, fusion=fusion, device=backend.device, dtype=torch.float32, channels=64).ours
    x = torch.randn(8, 64, 16, 16, device=backend.device, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x, torch.randn_like(x)) if fusion == "add+relu" else module(x)
    small = 64 * (4 + 4 + 16) + 8
    assert sum(kept.values()) <= most * x.nbytes + small


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_hooks_that_lose_the_memory_format(backend: Backend, fusion: str, layout: str) -> None:
    """Return saved tensors contiguous, as offloading does."""
    call, arguments = case(backend, fusion, True, layout=layout, shape=(3, 5, 2, 3))
    given = [a for a in arguments if a is not None]
    grad = torch.randn(3, 5, 2, 3, dtype=torch.float64, device=backend.device)
    want = torch.autograd.grad(call(*arguments), given, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        output = call(*arguments)
        got = torch.autograd.grad(output, given, grad)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(backend: Backend, use_reentrant: bool) -> None:
    module = Pair(2, fusion="relu", device=backend.device).ours
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=backend.device)
    grads = []
    for call in (
        module,
        lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=use_reentrant),
    ):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
