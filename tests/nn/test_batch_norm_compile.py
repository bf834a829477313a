"""torch.compile and torch.export: whole graphs, the numbers of eager calls, few compilations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import steadygrad as sg
from tests.nn.batch_norm_modules import FUSIONS, LAYOUTS, laid_out

# The emulated kernels are a Python attribute that a compiled graph does not look up again. These tests concern only the
# tracer, so they run where the tensors are.
DEVICE = "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def step(module: Any, x: Tensor, r: Tensor | None) -> list[Tensor]:
    """Return output and gradients of one call."""
    leaves = [t.detach().requires_grad_() for t in (x, r) if t is not None]
    output = module(*leaves)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
    return [output.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


def assert_same_bits(
    eager: nn.Module, compiled: nn.Module, fn: Any, x: Tensor, r: Tensor | None
) -> None:
    for want, got in zip(step(eager, x, r), step(fn, x, r), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(eager.buffers(), compiled.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.pairs
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_same_bits_in_one_graph(fusion: str, layout: str, training: bool) -> None:
    activation, adds = FUSIONS[fusion]
    eager = sg.nn.BatchNorm2d(5, activation=activation).train(training)
    nn.init.constant_(eager.weight, 4.0)  # so that some elements reach the ceiling of ReLU6
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(compiled, fullgraph=True, backend=counter)
    for batch in (4, 6, 9):
        x, r = torch.randn(2, batch, 5, 3, 3)
        assert_same_bits(
            eager, compiled, fn, laid_out(x, layout), laid_out(r, layout) if adds else None
        )
    # It compiles once for the first size and once for all others.
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_options(options: dict[str, Any]) -> None:
    eager = sg.nn.BatchNorm1d(5, **options)
    compiled = copy.deepcopy(eager)
    fn = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_same_bits(eager, compiled, fn, torch.randn(6, 5, 7), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    eager = sg.nn.BatchNorm2d(5, activation="relu")
    compiled = copy.deepcopy(eager)
    fn = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x, r = torch.randn(2, 4, 5, 3, 3).to(dtype)
    assert_same_bits(eager, compiled, fn, x, r)


def test_without_gradients_no_mask_is_kept() -> None:
    module = sg.nn.BatchNorm2d(5, activation="relu")
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    fn = torch.compile(module, fullgraph=True, backend=backend)
    x, r = torch.randn(2, 4, 5, 3, 3)
    with torch.no_grad():
        fn(x, r)
    (call,) = [node for node in graphs[0].graph.nodes if "batch_norm_training" in str(node.target)]
    assert call.args[-1] is False


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_the_default_compiler() -> None:
    """Compile between a convolution and a linear layer, whose memory formats the compiler may choose."""
    torch.manual_seed(1)
    eager = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        sg.nn.BatchNorm2d(8, activation="relu"),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    eager = eager.to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(eager)
    fn = torch.compile(compiled, fullgraph=True)
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        for want, got in zip(step(eager, x, None), step(fn, x, None), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    for one, other in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_within_the_graph(transform: str) -> None:
    module = sg.nn.BatchNorm1d(5, activation="relu").eval()
    x = torch.randn(3, 6, 5)

    def called(x: Tensor) -> Tensor:
        if transform == "vmap":
            return torch.func.vmap(lambda x: module(x))(x)
        return torch.func.grad(lambda x: module(x[0]).square().sum())(x)

    fn = torch.compile(called, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(x), called(x))


def test_empty_batch() -> None:
    module = sg.nn.BatchNorm2d(5, activation="relu")
    fn = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.empty(0, 5, 3, 3)
    assert fn(x, x).shape == x.shape
    assert int(module.num_batches_tracked) == 1


def test_refusals_in_compiled_code() -> None:
    module = sg.nn.BatchNorm2d(5)
    fn = torch.compile(module, backend="eager")
    with pytest.raises(RuntimeError, match="expected 4 elements"):
        fn(torch.randn(4, 4, 3, 3))
    assert int(module.num_batches_tracked) == 0


def test_after_a_graph_break_inside() -> None:
    """Compile frames of ours one by one, which has to give the same results."""
    eager = sg.nn.BatchNorm2d(5, activation="relu")
    compiled = copy.deepcopy(eager)

    @torch.compiler.disable
    def opaque(tensor: Tensor) -> Tensor:
        return tensor

    def called(x: Tensor, r: Tensor) -> Tensor:
        return opaque(compiled(opaque(x), r))

    fn = torch.compile(called, backend="aot_eager")
    for batch in (4, 5, 6):
        x, r = torch.randn(2, batch, 5, 3, 3)
        assert_same_bits(eager, compiled, fn, x, r)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export(training: bool, strict: bool) -> None:
    module = sg.nn.BatchNorm2d(5, activation="relu").train(training)
    x, r = torch.randn(2, 4, 5, 3, 3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module, (x, r), dynamic_shapes=({0: batch}, {0: batch}), strict=strict
    )
    # Only torch's operations may appear, so that the program runs without this package.
    assert not any("steadygrad" in str(node.target) for node in program.graph.nodes)
    x, r = torch.randn(2, 7, 5, 3, 3)
    torch.testing.assert_close(program.module()(x, r), module(x, r))
