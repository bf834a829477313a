"""Whole networks before and after convert_batchnorm: numbers, counts, checkpoints, compiled code."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from steadygrad.nn import known_blocks
from steadygrad.nn.conversion_report import conversion_report
from steadygrad.nn.convert import convert_batchnorm
from steadygrad.nn.known_blocks import register_block
from tests.nn.networks import (
    NETWORKS,
    STEPS,
    BasicBlock,
    ResNet,
    mobilenet_v2,
    resnet18,
)

COUNTS = {
    "ResNet-18": {"batch norm + ReLU": 9, "batch norm + add + ReLU": 8},
    "ResNet-50": {"batch norm + ReLU": 33, "batch norm + add + ReLU": 16},
    "MobileNetV2": {"batch norm + ReLU6": 35, "batch norm + add": 10},
}
NOT_FUSED = {"ResNet-18": 3, "ResNet-50": 4, "MobileNetV2": 7}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_blocks, "_REGISTERED", {})
    for block, steps in STEPS.items():
        register_block(block, steps)


def small() -> ResNet:
    return ResNet(BasicBlock, (1, 1, 1, 1), 10)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def assert_near(actual: Tensor, expected: Tensor, scale: Tensor, relative: float) -> None:
    """Compare relative to the largest element, since gradients that cancel to zero are nothing but rounding."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= relative * scale


@pytest.mark.parametrize(
    ("name", "training", "memory_format"),
    [
        ("ResNet-18", True, torch.contiguous_format),
        ("ResNet-18", False, torch.channels_last),
        ("ResNet-50", True, torch.channels_last),
        ("MobileNetV2", True, torch.channels_last),
        ("MobileNetV2", False, torch.contiguous_format),
    ],
)
def test_outputs_gradients_and_buffers_stay(
    name: str, training: bool, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(1)
    model = without_dropout(NETWORKS[name](10)).double().train(training)
    twin = convert_batchnorm(copy.deepcopy(model))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=memory_format)
    expected, actual = model(x), twin(x)
    assert_near(actual, expected, expected.abs().max(), 1e-11)
    expected.square().mean().backward()
    actual.square().mean().backward()
    largest = max(p.grad.abs().max() for p in model.parameters())
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        scale = torch.maximum(theirs.grad.abs().max(), 1e-6 * largest)
        assert_near(ours.grad, theirs.grad, scale, 1e-9)
    assert list(twin.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_counts(name: str) -> None:
    report = conversion_report(convert_batchnorm(NETWORKS[name](10)))
    assert report.operations == COUNTS[name]
    assert len(report.not_fused) == NOT_FUSED[name]
    assert report.left == ()
    assert len(str(report).splitlines()) == 1 + len(report.findings)


def test_the_report_names_the_reasons() -> None:
    found = {f.name: f for f in conversion_report(convert_batchnorm(resnet18())).findings}
    assert found["layer2.0.bn2"].operation == "batch norm + add + ReLU"
    assert found["layer2.0.downsample.1"].reason == "it is what another batch norm adds"
    found = {f.name: f for f in conversion_report(convert_batchnorm(mobilenet_v2())).findings}
    assert found["features.0.1"].operation == "batch norm + ReLU6"
    assert found["features.1.conv.2"].reason == "nothing that could be fused follows it"
    assert found["features.3.conv.3"].operation == "batch norm + add"


def test_an_optimizer_made_before_goes_on() -> None:
    torch.manual_seed(2)
    model = small().double()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, twin)]
    held = [*twin.parameters(), *twin.buffers()]
    assert convert_batchnorm(twin) is twin
    assert all(a is b for a, b in zip(held, [*twin.parameters(), *twin.buffers()], strict=True))
    x, target = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
    for module, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), target).backward()
            optimizer.step()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_checkpoints_go_both_ways() -> None:
    model, twin = small(), convert_batchnorm(small())
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    model.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_too(how: str) -> None:
    model = convert_batchnorm(small()).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), expected)
    assert str(conversion_report(twin)) == str(conversion_report(model))
    next(iter(twin.parameters())).data.zero_()
    assert torch.equal(model(x), expected), "a copy has parameters of its own"


def test_compiled_as_one_graph() -> None:
    torch.manual_seed(3)
    model = convert_batchnorm(small()).double()
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, actual = model(x), compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    expected.sum().backward()
    actual.sum().backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_a_second_conversion_changes_nothing() -> None:
    model = convert_batchnorm(small())
    classes = [type(m) for m in model.modules()]
    report = str(conversion_report(model))
    assert [type(m) for m in convert_batchnorm(model).modules()] == classes
    assert str(conversion_report(model)) == report
