"""A forward that convert_batchnorm does not know runs as it is written, at each call and at no other time."""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import steadygrad as sg

GENERATOR = np.random.default_rng(0)
COUNTER = itertools.count()
CALLS: list[object] = []


class Block(nn.Module):
    """A convolution, batch norms, a ReLU and a body to test."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def image() -> Tensor:
    return torch.linspace(-2, 3, 4 * 3 * 5 * 5, dtype=torch.float64).sin().view(4, 3, 5, 5)


def pair(body: Callable[..., Tensor]) -> tuple[Block, Block]:
    """Return the original block and its converted twin."""
    torch.manual_seed(0)
    model = Block(body).double()
    return model, sg.nn.convert_batchnorm(copy.deepcopy(model))


def assert_same(model: nn.Module, twin: nn.Module, seed: Callable[[], None] = lambda: None) -> None:
    """Check outputs, gradients and buffers over some calls in both modes."""
    for training in (True, False):
        model.train(training), twin.train(training)
        for _ in range(4):
            seed()
            expected = model(image())
            seed()
            actual = twin(image())
            torch.testing.assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for name, value in model.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), value)


BODIES: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "module": lambda m, x: m.relu(m.bn(m.conv(x))),
    "F.relu": lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True),
    "relu_": lambda m, x: m.bn(m.conv(x)).relu_(),
    "add": lambda m, x: x + m.bn(m.conv(x)),
    "add_": lambda m, x: m.bn(m.conv(x)).add_(x).relu(),
    "iadd": lambda m, x: m.relu(operator.iadd(m.bn(m.conv(x)), x)),
    "two batch norms": lambda m, x: m.relu(m.bn(m.conv(x)) + m.other(x)),
    "used twice": lambda m, x: (lambda y: F.relu(y) + y)(m.bn(m.conv(x))),
    "in place into another": lambda m, x: operator.iadd(x * 1, m.bn(m.conv(x))),
    "alpha": lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2),
    "broadcast": lambda m, x: F.relu(m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True)),
    "ReLU6": lambda m, x: F.relu6(m.bn(m.conv(x))),
    "depends on values": lambda m, x: m.relu(m.bn(x)) if x.sum() > 0 else m.bn(x),
    "depends on the mode": lambda m, x: m.relu(m.bn(x)) if m.training else m.bn(x) - 1,
    "without gradients": lambda m, x: m.conv(m.relu(torch.no_grad()(m.bn)(x))),
}


@pytest.mark.parametrize("name", BODIES)
def test_each_form(name: str) -> None:
    model, twin = pair(BODIES[name])
    assert type(twin) is Block and type(twin.bn) is sg.nn.BatchNorm2d
    assert_same(model, twin)


def skips_at_random(m: Block, x: Tensor) -> Tensor:
    if m.training and np.random.rand() < 0.5:
        return x * m.conv.weight.sum()
    return m.relu(m.bn(m.conv(x)))


def has_noise(m: Block, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x))) * float(np.random.rand())


def has_a_generator(m: Block, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x))) * GENERATOR.random()


def counts(m: Block, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x))) * next(COUNTER)


def reset(to: int) -> None:
    """Reset every source of randomness that the bodies use, each to another value."""
    global GENERATOR, COUNTER
    np.random.seed(to)
    GENERATOR, COUNTER = np.random.default_rng(to), itertools.count(to)


@pytest.mark.parametrize("body", [skips_at_random, has_noise, has_a_generator, counts])
def test_what_is_drawn_or_counted_is_so_at_each_call(body: Callable[..., Tensor]) -> None:
    model, twin = pair(body)
    for to in range(8):
        reset(to)
        expected = model(image())
        reset(to)
        torch.testing.assert_close(twin(image()), expected)


def follows_the_process_group(m: Block, x: Tensor) -> Tensor:
    output = m.relu(m.bn(m.conv(x)))
    return output * 2 if torch.distributed.is_initialized() else output


def test_whether_there_is_a_process_group_is_asked_at_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, twin = pair(follows_the_process_group)
    before = twin.eval()(image())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    torch.testing.assert_close(twin(image()), 2 * before)


def has_a_gain(m: Any, x: Tensor) -> Tensor:
    output = m.relu(m.bn(m.conv(x)))
    return output if m.gain is None else output * m.gain


def has_a_default(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x))) * getattr(m, "gain", 1.0)


def has_layers(m: Any, x: Tensor) -> Tensor:
    x = m.relu(m.bn(m.conv(x)))
    for layer in m.layers:
        x = layer(x)
    return x


def has_an_end(m: Any, x: Tensor) -> Tensor:
    x = m.relu(m.bn(m.conv(x)))
    return x if m.end is None else m.end(x)


def has_a_table(m: Any, x: Tensor) -> Tensor:
    x = m.relu(m.bn(m.conv(x)))
    for name, layer in m.table.items():
        x = layer(x) * len(name)
    return x


@pytest.mark.parametrize("body", [has_a_gain, has_a_default])
def test_a_parameter_that_comes_later_counts(body: Callable[..., Tensor]) -> None:
    model = Block(body).double()
    if body is has_a_gain:
        model.register_parameter("gain", None)
    twin = sg.nn.convert_batchnorm(copy.deepcopy(model))
    assert_same(model, twin)
    model.zero_grad(), twin.zero_grad()
    for m in (model, twin):
        m.gain = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))
    assert_same(model, twin)
    assert twin.gain.grad is not None


def test_members_that_come_and_go_count() -> None:
    for body, name, first, later in (
        (has_layers, "layers", nn.ModuleList(), nn.ModuleList([nn.Tanh()])),
        (has_an_end, "end", nn.Tanh(), None),
        (has_a_table, "table", nn.ModuleDict({"a": nn.Tanh()}), nn.ModuleDict({"bb": nn.Tanh()})),
    ):
        model = Block(body).double()
        setattr(model, name, first)
        twin = sg.nn.convert_batchnorm(copy.deepcopy(model))
        torch.testing.assert_close(twin(image()), model(image()))
        for m in (model, twin):
            setattr(m, name, copy.deepcopy(later))
        torch.testing.assert_close(twin(image()), model(image()))


@contextlib.contextmanager
def noted() -> Iterator[None]:
    CALLS.append("in")
    yield
    CALLS.append("out")


def has_effects(m: Any, x: Tensor) -> Tensor:
    with noted():
        x = m.relu(m.bn(m.conv(x)))
    CALLS.append(x)
    COUNTS["calls"] = COUNTS.get("calls", 0) + 1
    try:
        return x * m.absent
    except AttributeError:
        return x


COUNTS: dict[str, int] = {}


def test_effects_of_a_forward_take_place_once_a_call() -> None:
    CALLS.clear(), COUNTS.clear()
    twin = sg.nn.convert_batchnorm(Block(has_effects).double())
    assert CALLS == [] and COUNTS == {}
    for _ in range(2):
        twin(image())
    assert [type(entry) for entry in CALLS] == [str, str, Tensor] * 2
    assert COUNTS == {"calls": 2}
    twin.absent = 3.0
    torch.testing.assert_close(twin(image()).detach(), 3 * CALLS[-1].detach())


def draws(m: Block, x: Tensor) -> Tensor:
    CALLS.append("forward")
    return m.relu(m.bn(m.conv(x))) + float(np.random.rand() > 2)


def test_nothing_but_a_call_runs_a_forward() -> None:
    CALLS.clear()
    np.random.seed(3)
    first = np.random.rand()
    np.random.seed(3)
    model = nn.Sequential(sg.nn.convert_batchnorm(Block(draws)))
    sg.nn.conversion_report(sg.nn.convert_batchnorm(model))
    copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    AveragedModel(model)
    sg.nn.conversion_report(model)
    assert CALLS == [] and np.random.rand() == first


def test_global_hooks_are_called_for_every_module() -> None:
    models = {
        "chain": nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU()),
        "block": Block(BODIES["module"]),
    }
    for model in models.values():
        twin = sg.nn.convert_batchnorm(model.double())
        twin(image())
        CALLS.clear()
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_: CALLS.append(type(module))
        )
        try:
            twin(image())
        finally:
            handle.remove()
        assert nn.ReLU in CALLS and sg.nn.BatchNorm2d in CALLS


def test_a_forward_that_was_replaced_on_a_module_is_called() -> None:
    for twin in (
        sg.nn.convert_batchnorm(Block(BODIES["module"]).double()),
        sg.nn.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double()),
    ):
        relu = next(module for module in twin.modules() if isinstance(module, nn.ReLU))
        relu.forward = lambda x: torch.full_like(x, 7.0)
        assert bool((twin(image()) == 7).all())
        del relu.forward
        norm = next(module for module in twin.modules() if isinstance(module, nn.BatchNorm2d))
        norm.forward = lambda x: torch.full_like(x, 5.0)
        assert bool((twin(image()) == 5).all())


def test_accelerate_offloads_a_converted_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), Block(BODIES["module"])
    ).double()
    twin = sg.nn.convert_batchnorm(copy.deepcopy(model)).eval()
    accelerate.cpu_offload(twin, execution_device=torch.device("cpu"))
    torch.testing.assert_close(twin(image()), model.eval()(image()))
