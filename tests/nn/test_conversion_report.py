"""What conversion_report tells to write for blocks that are not known, and what it counts as fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steadygrad as sg
from steadygrad.nn import known_blocks


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_blocks, "_REGISTERED", {})


class Layers(nn.Module):
    """Has the members that the forwards below call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu, self.gelu = nn.ReLU(), nn.GELU()
        self.chain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.downsample: nn.Module | None = None
        self.adds = True


def written(forward: Callable[..., Any]) -> Any:
    return type("Written", (Layers,), {"forward": forward})


def straight(self: Any, x: Tensor) -> Tensor:
    """Has a docstring."""
    return self.relu(self.bn1(self.conv1(x)))


def residual(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    return self.relu(x + y)


def residual_in_place(self: Any, x: Tensor) -> Tensor:
    identity = x
    out = self.conv1(x)
    out = self.bn1(out)
    out = self.relu(out)
    out = self.bn2(self.conv2(out))
    if self.downsample is not None:
        identity = self.downsample(x)
    out += identity
    return self.relu(out)


def two_branches(self: Any, x: Tensor) -> Tensor:
    return self.bn2(self.conv2(x)) + self.chain(x)


def added_if(self: Any, x: Tensor) -> Tensor:
    return x + self.chain(x) if self.adds else self.chain(x)


def returned_if(self: Any, x: Tensor) -> Tensor:
    if self.adds:
        return x + self.chain(x)
    return self.chain(x)


def added_in_place_if(self: Any, x: Tensor) -> Tensor:
    y = self.chain(x)
    if self.adds:
        y += x
    return self.relu(y)


STEPS = {
    added_if: ('"chain", add="adds"', 1),
    returned_if: ('"chain", add="adds"', 1),
    added_in_place_if: ('"chain", add="adds", last="relu", in_place=True', 1),
    straight: ('"conv1 bn1 relu"', 1),
    residual: ('"conv1 bn1 relu conv2 bn2", add=True, last="relu"', 2),
    residual_in_place: (
        '"conv1 bn1 relu conv2 bn2", add=True, shortcut="downsample?", last="relu", in_place=True',
        2,
    ),
    two_branches: ('"conv2 bn2", add=True, shortcut="chain"', 1),
}


@pytest.mark.parametrize("forward", STEPS, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("downsample", [False, True])
def test_the_steps_to_register(forward: Any, downsample: bool) -> None:
    arguments, count = STEPS[forward]
    kind = written(forward)
    model = kind().double()
    if downsample:
        model.downsample = copy.deepcopy(model.chain)
    twin = sg.nn.convert_batchnorm(copy.deepcopy(model))
    report = sg.nn.conversion_report(twin)
    line = f"sg.nn.register_block(Written, sg.nn.Steps({arguments}))"
    assert [f.line for f in report.findings if f.line] == [line] * count
    assert str(report).splitlines()[-2:] == [
        "write this, and call convert_batchnorm again:",
        f"    {line}",
    ]
    exec(line, {"sg": sg, "Written": kind})
    report = sg.nn.conversion_report(sg.nn.convert_batchnorm(twin))
    assert len(report.fused) == count
    assert not any(finding.line for finding in report.findings)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for adds in (True, False):
        model.adds = twin.adds = adds
        torch.testing.assert_close(twin(x), model(x))


def functional(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.bn1(self.conv1(x)), inplace=True)
    return F.relu(self.bn2(self.conv2(y)) + x)


def another_activation(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn2(self.conv2(self.gelu(self.bn1(x)))))


def functional_relu6(self: Any, x: Tensor) -> Tensor:
    return self.gelu(self.bn2(F.relu6(self.bn1(self.conv1(x)))))


def computed(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(x)) * self.bn2(x).mean()


def used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv1(x)
    return self.bn1(y) + y


def two_ways(self: Any, x: Tensor) -> Tensor:
    if self.adds:
        return self.bn1(x)
    return self.bn2(x)


def added_elsewhere_if(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(x)
    if self.adds:
        y = self.bn2(x) + x
    return y


def of_another_method(self: Any, x: Tensor) -> Tensor:
    return self.zero_grad(x)


CALLS = {
    functional: ["bn1, y, relu=F.relu", "bn2, y, residual, relu=F.relu"],
    another_activation: ["bn2, y, relu=F.relu"],
    functional_relu6: ["bn1, y, relu=F.relu6"],
}
NOT_READ = [computed, used_twice, two_ways, added_elsewhere_if, of_another_method]


@pytest.mark.parametrize("forward", CALLS, ids=lambda forward: forward.__name__)
def test_the_calls_to_write_where_names_are_not_enough(forward: Any) -> None:
    report = sg.nn.conversion_report(sg.nn.convert_batchnorm(written(forward)()))
    assert [finding.line for finding in report.findings if finding.line] == [
        "sg.nn.register_block(Written, forward)  # forward(self, x) has "
        f"sg.nn.batch_norm_add_relu(self.{arguments})"
        for arguments in CALLS[forward]
    ]


@pytest.mark.parametrize("forward", NOT_READ, ids=lambda forward: forward.__name__)
def test_a_forward_that_cannot_be_read(forward: Any) -> None:
    report = sg.nn.conversion_report(sg.nn.convert_batchnorm(written(forward)()))
    assert [finding.line for finding in report.findings if finding.line] == [
        "sg.nn.register_block(Written, forward)  # if ReLU or + follows: "
        f"sg.nn.batch_norm_add_relu(self.{name}, ...)"
        for name in ("bn1", "bn2")
    ]


def test_batch_norms_in_lists_and_without_a_forward() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.layers = nn.ModuleList([nn.BatchNorm2d(3)])

    first, second = sg.nn.conversion_report(sg.nn.convert_batchnorm(Unknown())).findings
    assert first.status == second.status == "converted"
    assert first.reason == second.reason == "the forward of Unknown is not known"
    assert first.line.endswith("sg.nn.batch_norm_add_relu(self.bn, ...)")
    assert second.line.endswith("sg.nn.batch_norm_add_relu(self.layers[0], ...)")


def test_what_follows_is_named() -> None:
    report = sg.nn.conversion_report(sg.nn.convert_batchnorm(written(another_activation)()))
    assert report.findings[0].reason == "it is followed by self.gelu"


def test_a_batch_norm_with_an_activation_counts_as_fused() -> None:
    model = nn.ModuleList([sg.nn.BatchNorm2d(4, activation="relu"), sg.nn.BatchNorm2d(4)])
    report = sg.nn.conversion_report(model)
    assert report.operations == {"batch norm + ReLU": 1} and len(report.not_fused) == 1
    assert report.fused[0].reason == "by its own activation='relu'"
    header, row, _ = str(report).splitlines()
    assert header.startswith("2 batch norms: 1 fused (1 x batch norm + ReLU), 1 converted only")
    assert row.endswith("fused      batch norm + ReLU, by its own activation='relu'")


def test_a_block_with_a_function_counts_as_fused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = sg.nn.batch_norm_add_relu(self.bn1, self.conv1(x), relu=F.relu)
        return sg.nn.batch_norm_add_relu(self.bn2, self.conv2(y), x, F.relu)

    model = sg.nn.convert_batchnorm(written(functional)(), fuse=False)
    sg.nn.register_block(type(model), forward)
    report = sg.nn.conversion_report(model)
    assert not report.fused
    assert report.findings[0].reason == "fuse was False, or the block was registered later"
    report = sg.nn.conversion_report(sg.nn.convert_batchnorm(model))
    assert report.operations == {"batch_norm_add_relu": 2}
    assert {f.reason for f in report.fused} == {"by the forward registered for Written"}
    assert [(f.name, f.reason) for f in report.not_fused] == [
        ("chain.1", "it is part of the chain chain")
    ]


def test_a_function_that_fuses_nothing_does_not_count() -> None:
    kind = written(functional)
    sg.nn.register_block(kind, functional)
    report = sg.nn.conversion_report(sg.nn.convert_batchnorm(kind()))
    assert not report.fused
    expected = "the forward registered for Written does not call batch_norm_add_relu"
    assert {f.reason for f in report.findings} == {expected}
