"""Modules compared with torch's: outputs, gradients, buffers, and what copies and files of a module keep."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import steadygrad as sg
from steadygrad import _kernels
from tests.backends import Backend
from tests.nn.batch_norm_modules import FUSIONS, LAYOUTS, SHAPES, Pair, laid_out

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not affine": {"affine": False},
    "cumulative": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "no statistics": {"track_running_stats": False},
    "cumulative without statistics": {"momentum": None, "track_running_stats": False},
    "eps": {"eps": 0.5},
}
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
    OPTIONS["no bias"] = {"bias": False}
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dimensions"), SHAPES, ids=str)
def test_shapes_and_layouts(
    backend: Backend,
    shape: tuple[int, ...],
    dimensions: int,
    layout: str,
    fusion: str,
    training: bool,
) -> None:
    pair = Pair(dimensions, fusion=fusion, device=backend.device).train(training)
    for _ in range(2):
        x = laid_out(torch.randn(shape, dtype=torch.float64, device=backend.device), layout)
        pair.assert_equal(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(backend: Backend, options: dict[str, Any], training: bool) -> None:
    pair = Pair(2, fusion="add+relu", device=backend.device, **options)
    for step in range(4):
        # The first step trains, so that there are statistics to evaluate with.
        pair.train(training or step < 2)
        x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=backend.device)
        pair.assert_equal(x + step)
    assert list(pair.ours.state_dict()) == list(pair.theirs.state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_dtypes(
    backend: Backend, dtype: torch.dtype, parameters: torch.dtype | None, training: bool
) -> None:
    """Compare half-precision input with its own or float32 parameters, to the rounding of the smaller dtype."""
    pair = Pair(2, fusion="relu", device=backend.device, dtype=parameters or dtype)
    pair.train(training)
    x = torch.randn(4, 5, 3, 3, device=backend.device).to(dtype)
    near = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    pair.assert_equal(x, rtol=near, atol=2 * near)


def test_flags_that_change_later(backend: Backend) -> None:
    """Change ``track_running_stats`` and ``momentum``, which are read at each call, as in torch."""
    pair = Pair(2, device=backend.device)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=backend.device)
    for training, track, momentum in [
        (True, False, 0.1),
        (False, False, 0.1),
        (True, True, 0.7),
        (True, True, None),
    ]:
        for module in (pair.theirs, pair.ours):
            module.train(training)
            module.track_running_stats = track
            module.momentum = momentum
        pair.assert_equal(x)


def test_buffers_taken_away(backend: Backend) -> None:
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=backend.device)
    pair = Pair(2, device=backend.device, momentum=None)
    for module in (pair.theirs, pair.ours):
        module.num_batches_tracked = None
    pair.assert_equal(x)
    for module in (pair.theirs, pair.ours):
        module.running_mean = module.running_var = None
    pair.assert_equal(x)
    pair.train(False).assert_equal(x)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(
    backend: Backend, shape: tuple[int, ...], training: bool, momentum: float | None
) -> None:
    pair = Pair(2, fusion="add+relu", device=backend.device, momentum=momentum).train(training)
    pair.assert_equal(torch.empty(shape, dtype=torch.float64, device=backend.device))


def test_empty_batch_of_half_precision(backend: Backend) -> None:
    pair = Pair(2, device=backend.device, dtype=torch.float32)
    pair.assert_equal(torch.empty(0, 5, 3, 3, dtype=torch.bfloat16, device=backend.device))


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(backend: Backend, training: bool) -> None:
    pair = Pair(2, fusion="add+relu", device=backend.device).train(training)
    x, r = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64, device=backend.device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got, want = pair.ours(x, r), pair.torch_call(x, r)
        torch.testing.assert_close(got, want)
        assert not got.requires_grad
        assert got.is_inference() == want.is_inference()
    torch.testing.assert_close(pair.ours.state_dict(), pair.theirs.state_dict())


def test_made_in_inference_mode(backend: Backend) -> None:
    with torch.inference_mode():
        pair = Pair(2, device=backend.device)
        x = torch.randn(4, 5, 3, 3, dtype=torch.float64, device=backend.device)
        torch.testing.assert_close(pair.ours(x), pair.theirs(x))
        torch.testing.assert_close(pair.ours.state_dict(), pair.theirs.state_dict())


def test_buffers_are_changed_in_place(backend: Backend) -> None:
    """Check that buffers are changed in place, as data-parallel wrappers need, and that version counters show it."""
    module = sg.nn.BatchNorm2d(5, device=backend.device)
    before = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}
    module(torch.randn(4, 5, 3, 3, device=backend.device))
    for name, buffer in module.named_buffers():
        assert buffer is before[name][0]
        assert buffer._version > before[name][1], name


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_autocast_leaves_dtypes_alone(backend: Backend, dtype: torch.dtype, enabled: bool) -> None:
    pair = Pair(2, device=backend.device, dtype=torch.float32)
    x = torch.randn(4, 5, 3, 3, device=backend.device).to(dtype)
    with torch.autocast(backend.device.type, torch.bfloat16, enabled=enabled):
        assert pair.ours(x).dtype == pair.theirs(x).dtype == dtype


@pytest.mark.parametrize(
    "kinds", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_autocast_promotes_a_residual(
    backend: Backend, kinds: tuple[torch.dtype, torch.dtype]
) -> None:
    pair = Pair(2, fusion="add+relu", device=backend.device, dtype=torch.float32)
    x = torch.randn(4, 5, 3, 3, device=backend.device).to(kinds[0])
    r = torch.randn(4, 5, 3, 3, device=backend.device).to(kinds[1])
    with torch.autocast(backend.device.type, torch.bfloat16):
        got, want = pair.ours(x, r), pair.torch_call(x, r)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    assert int(pair.ours.num_batches_tracked) == 1


def test_residual_in_another_memory_format_is_converted(backend: Backend) -> None:
    pair = Pair(2, fusion="add+relu", device=backend.device)
    for layouts in (("first", "last"), ("last", "first"), ("first", "strided")):
        x, r = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64, device=backend.device)
        pair.assert_equal(laid_out(x, layouts[0]), laid_out(r, layouts[1]))


@pytest.mark.parametrize("layout", ["first", "last"])
def test_output_keeps_the_memory_format(backend: Backend, layout: str) -> None:
    for shape, dimensions in SHAPES:
        x = laid_out(torch.randn(shape, device=backend.device), layout).requires_grad_()
        module = getattr(sg.nn, f"BatchNorm{dimensions}d")(5, device=backend.device)
        output = module(x)
        assert output.stride() == x.stride()
        output.sum().backward()
        assert x.grad is not None
        assert x.grad.stride() == x.stride()


# --- what travels with a module ---


def test_is_torchs_class() -> None:
    for dimensions in (1, 2, 3):
        ours = getattr(sg.nn, f"BatchNorm{dimensions}d")
        assert issubclass(ours, getattr(nn, f"BatchNorm{dimensions}d"))
        assert isinstance(ours(3), nn.modules.batchnorm._BatchNorm)
        given = list(inspect.signature(ours).parameters)
        assert given[:7] == list(inspect.signature(nn.BatchNorm2d).parameters)[:7]


def test_state_dict_goes_both_ways() -> None:
    ours, theirs = sg.nn.BatchNorm2d(5, activation="relu"), nn.BatchNorm2d(5)
    theirs(torch.randn(4, 5, 3, 3))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours(torch.randn(4, 5, 3, 3))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


def test_loads_a_state_dict_of_the_first_version() -> None:
    state = nn.BatchNorm2d(5).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    module = sg.nn.BatchNorm2d(5)
    module.load_state_dict(state, strict=True)
    assert int(module.num_batches_tracked) == 0


def test_copies_and_pickles() -> None:
    module = sg.nn.BatchNorm2d(5, activation="relu", momentum=None)
    x = torch.randn(4, 5, 3, 3)
    module(x)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    twins = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stored, weights_only=False),
    ]
    want = module(x)
    for twin in twins:
        assert twin.running_mean.data_ptr() != module.running_mean.data_ptr()
        assert torch.equal(twin(x), want)
        assert torch.equal(twin.running_var, module.running_var)


def test_copies_share_what_a_deepcopy_shares() -> None:
    module = sg.nn.BatchNorm1d(5)
    both = copy.deepcopy(nn.ModuleList([module, module]))
    assert both[0] is both[1]
    group = object()
    module.process_group = group
    assert copy.deepcopy(module).process_group is group


def test_shows_its_arguments() -> None:
    shown = repr(sg.nn.BatchNorm2d(5))
    assert shown == repr(nn.BatchNorm2d(5))
    assert repr(sg.nn.BatchNorm2d(5, activation="relu")) == f"{shown[:-1]}, activation=relu)"


def test_conversions_of_a_module(backend: Backend) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        pair = Pair(1, device="cpu", dtype=torch.float32)
        pair.ours.to(backend.device, dtype)
        pair.theirs.to(backend.device, dtype)
        x = torch.randn(6, 5, device=backend.device).to(dtype)
        pair.assert_equal(x, rtol=2e-2, atol=4e-2)


def test_parametrized_weight(backend: Backend) -> None:
    """Use parametrizations, pruning and replicas, which keep parameters elsewhere than modules register them."""

    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    module = sg.nn.BatchNorm1d(5, device=backend.device)
    x = torch.randn(6, 5, device=backend.device)
    want = 2 * module(x)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Twice())
    torch.testing.assert_close(module(x), want)
    module(x).sum().backward()
    assert module.parametrizations.weight.original.grad is not None


def test_functional_call(backend: Backend) -> None:
    module = sg.nn.BatchNorm1d(5, device=backend.device)
    x = torch.randn(6, 5, device=backend.device)
    weight = torch.full((5,), 3.0, device=backend.device)
    got = torch.func.functional_call(module, {"weight": weight}, (x,))
    torch.testing.assert_close(got, 3 * module(x))


class Block(nn.Module):
    """Batch norm with and without a residual, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Sequential(sg.nn.BatchNorm2d(4, activation="relu"))
        self.outer = sg.nn.BatchNorm2d(4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        made = self.conv(input)
        output: torch.Tensor = self.outer(self.inner(made), residual=made)
        return output


def test_symbolic_tracing_keeps_the_modules_as_calls() -> None:
    block = Block()
    traced = torch.fx.symbolic_trace(block)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["conv", "inner.0", "outer"]
    assert len(traced.graph.nodes) == len(calls) + 2
    twin = copy.deepcopy(block)
    x = torch.randn(2, 3, 5, 5)
    for training in (True, False):  # a traced module has both modes
        got, want = traced.train(training)(x), twin.train(training)(x)
        assert torch.equal(got, want)
    for ours, theirs in zip(traced.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    traced(x).sum().backward()
    twin(x).sum().backward()
    for ours, theirs in zip(traced.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_symbolic_tracing_refuses_hooks_that_would_run_twice() -> None:
    block = Block()
    block.outer.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(torch.fx.proxy.TraceError, match="BatchNorm2d: expected no hooks"):
        torch.fx.symbolic_trace(block)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_the_way_in_is_short(training: bool, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the calls from the module to the kernel's binding: the function, autograd's function, nothing else."""
    kernel = "batch_norm_forward" if training else "batch_norm_normalize"
    original = getattr(_kernels, kernel)
    seen: list[str] = []

    def watched(*arguments: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_call_impl":
            seen.append(frame.f_code.co_name)
            frame = frame.f_back
        return original(*arguments)

    monkeypatch.setattr(_kernels, kernel, watched)
    norm = sg.nn.BatchNorm2d(3).train(training)
    with torch.set_grad_enabled(grad):
        norm(torch.randn(2, 3, 4, 4))
    assert seen == ["forward", "batch_norm", "forward"]
