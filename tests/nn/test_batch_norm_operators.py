"""The operators that tracers see: opcheck, fakes, modes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import steadygrad as sg
from steadygrad.reference.batch_norm import CEILINGS
from tests.backends import Backend
from tests.nn.batch_norm_modules import FUSIONS, LAYOUTS, SHAPES, Pair, laid_out

# torch 2.14's opcheck reads the .grad of tensors that it has turned into non-leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

OPERATORS = torch.ops.steadygrad
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Recorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def operands(
    backend: Backend,
    fusion: str,
    layout: str,
    affine: bool,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, ...] = (3, 5, 2, 3),
    grad: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return input, residual, weight and bias."""

    def made(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, device=backend.device).to(dtype)

    x, r = laid_out(made(*shape), layout), laid_out(made(*shape), layout)
    w, b = 4 * made(shape[1]), made(shape[1])  # so that some elements reach the ceiling of ReLU6
    for tensor in (x, r, w, b):
        tensor.requires_grad_(grad)
    return x, r if FUSIONS[fusion][1] else None, w if affine else None, b if affine else None


def ceiling_and_mask(fusion: str) -> tuple[float | None, bool]:
    """Return the ceiling, and whether a mask has to be kept."""
    activation, adds = FUSIONS[fusion]
    return CEILINGS[activation], activation is not None and adds


@pytest.mark.pairs
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_opcheck_of_training(backend: Backend, fusion: str, layout: str, affine: bool) -> None:
    arguments = operands(backend, fusion, layout, affine)
    torch.library.opcheck(
        OPERATORS.batch_norm_training.default, (*arguments, 1e-5, *ceiling_and_mask(fusion))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_opcheck_of_inference(backend: Backend, fusion: str, layout: str) -> None:
    arguments = operands(backend, fusion, layout, True)
    mean = torch.randn(5, dtype=torch.float64, device=backend.device)
    torch.library.opcheck(
        OPERATORS.batch_norm_inference.default,
        (*arguments, mean, mean.exp(), 1e-5, *ceiling_and_mask(fusion)),
    )


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", ["all", "statistics", "batches"])
def test_opcheck_of_tracking(backend: Backend, tracked: str, momentum: float | None) -> None:
    if tracked == "statistics" and momentum is None:
        momentum = 0.5
    statistics = torch.rand(11, dtype=torch.float64, device=backend.device)
    mean = torch.randn(5, device=backend.device) if tracked != "batches" else None
    var = torch.rand(5, device=backend.device) if tracked != "batches" else None
    batches = torch.tensor(3, device=backend.device) if tracked != "statistics" else None
    torch.library.opcheck(
        OPERATORS.batch_norm_track_.default, (statistics, mean, var, batches, momentum)
    )


@pytest.mark.pairs
@pytest.mark.parametrize(
    "needed", [[True] * 4, [True, False, False, False], [False, True, False, True]]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_opcheck_of_backward(
    backend: Backend, fusion: str, layout: str, needed: list[bool]
) -> None:
    ceiling, keep_mask = ceiling_and_mask(fusion)
    x, r, w, b = operands(backend, fusion, layout, True, grad=False)
    _, mask, statistics = OPERATORS.batch_norm_training(x, r, w, b, 1e-5, ceiling, keep_mask)
    kept = mask if keep_mask else None
    needed = [needed[0], needed[1] and r is not None, *needed[2:]]
    arguments = (torch.randn_like(x), x, kept, w, b, statistics, None, None, 1e-5, ceiling)
    torch.library.opcheck(OPERATORS.batch_norm_backward.default, (*arguments, b.dtype, needed))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_eager_calls(
    backend: Backend, dtype: torch.dtype, fusion: str, layout: str, training: bool
) -> None:
    for shape, dimensions in SHAPES:
        pair = Pair(dimensions, fusion=fusion, device=backend.device, dtype=dtype)
        eager, seen = (
            pair.train(training).ours,
            Pair(dimensions, fusion=fusion, device=backend.device, dtype=dtype)
            .train(training)
            .ours,
        )
        seen.load_state_dict(eager.state_dict())
        x, r, _, _ = operands(backend, fusion, layout, False, dtype, shape)
        grad = torch.randn(shape, device=backend.device).to(dtype)
        results = []
        for module, recorder in ((eager, None), (seen, Recorder())):
            leaves = [t.detach().requires_grad_() for t in (x, r) if t is not None]
            if recorder is None:
                output = module(*leaves)
                output.backward(grad)
            else:
                with recorder:
                    output = module(*leaves)
                    output.backward(grad)
                assert any(name.startswith("steadygrad::batch_norm") for name in recorder.names)
                assert "steadygrad::batch_norm_backward" in recorder.names
            tensors = [output, *[leaf.grad for leaf in leaves]]
            tensors += [p.grad for p in module.parameters()]
            results.append([*tensors, *module.buffers()])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
            assert got.stride() == want.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_derivatives_of_any_order(backend: Backend, fusion: str, training: bool) -> None:
    """Differentiate the operators' gradients again."""
    given = operands(backend, fusion, "last", True, shape=(3, 2, 2, 2))
    mean = torch.randn(2, dtype=torch.float64, device=backend.device)

    def call(*arguments: Tensor | None) -> Tensor:
        options = (1e-5, *ceiling_and_mask(fusion))
        if training:
            return OPERATORS.batch_norm_training(*arguments, *options)[0]
        return OPERATORS.batch_norm_inference(*arguments, mean, mean.exp(), *options)[0]

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_no_mask_no_gradient(backend: Backend) -> None:
    x, r, w, b = operands(backend, "add+relu", "first", True)
    with pytest.raises(RuntimeError, match="keep_mask: expected True"):
        OPERATORS.batch_norm_training(x, r, w, b, 1e-5, math.inf, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors(layout: str) -> None:
    """Check shapes, dtypes and strides without a computation."""
    with FakeTensorMode():
        module = sg.nn.BatchNorm2d(5, activation="relu")
        x = laid_out(torch.empty(4, 5, 3, 3), layout)
        output = module(x, torch.empty_like(x))
    assert output.shape == (4, 5, 3, 3)
    memory_format = torch.channels_last if layout == "last" else torch.contiguous_format
    assert output.is_contiguous(memory_format=memory_format)


def test_fake_tensor_outside_of_its_mode() -> None:
    with FakeTensorMode():
        module = sg.nn.BatchNorm1d(5)
        x = torch.empty(4, 5)
    assert module(x).shape == (4, 5)


def test_make_fx_sees_operators() -> None:
    module = sg.nn.BatchNorm1d(5)
    graph = make_fx(lambda x: module(x))(torch.randn(4, 5))
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "steadygrad.batch_norm_training.default" in targets
    x = torch.randn(7, 5)
    torch.testing.assert_close(make_fx(lambda x: module(x))(x)(x), module(x))
