"""Blocks whose forward convert_batchnorm knows: registered ones, torchvision's and timm's."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steadygrad as sg
from steadygrad.nn import fusion, known_blocks
from tests.nn.vision_libraries import vision


class Block(nn.Module):
    """A residual block that uses most of what `Steps` can describe."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.bn2 = nn.BatchNorm2d(4)
        self.drop = nn.Identity()
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = self.drop(y)
        if self.downsample is not None:
            x = self.downsample(x)
        y += x
        return self.relu(y)


class Derived(Block):
    """Inherits the forward."""


def written(self: Any, x: Tensor) -> Tensor:
    y = sg.nn.batch_norm_add_relu(self.bn1, self.conv1(x), relu=self.relu)
    y = self.conv2(y)
    if self.downsample is not None:
        x = self.downsample(x)
    return sg.nn.batch_norm_add_relu(self.bn2, y, x, self.relu, in_place=True)


STEPS = sg.nn.Steps(
    "conv1 bn1 relu conv2 bn2", True, "drop", "downsample?", last="relu", in_place=True
)
FUSED = ["batch norm + ReLU", "batch norm + add + ReLU"]
ADD_RELU = FUSED[1]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_blocks, "_REGISTERED", {})
    sg.nn.register_block(Block, STEPS)


def image(channels: int = 4) -> Tensor:
    numbers = torch.linspace(-2, 3, 2 * channels * 6 * 6, dtype=torch.float64)
    return (numbers * 7).sin().view(2, channels, 6, 6)


def pair(block: nn.Module) -> tuple[Any, Any]:
    model = block.double()
    return model, sg.nn.convert_batchnorm(copy.deepcopy(model))


def operations(model: nn.Module) -> list[str]:
    return sorted(finding.operation for finding in sg.nn.conversion_report(model).fused)


def assert_same(model: nn.Module, twin: nn.Module, x: Tensor | None = None) -> None:
    """Check outputs, gradients and buffers in both modes."""
    x = image() if x is None else x
    for training in (True, False):
        model.train(training), twin.train(training)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        expected, actual = model(inputs[0] * 1), twin(inputs[1] * 1)
        torch.testing.assert_close(actual, expected)
        for m, output in ((model, expected), (twin, actual)):
            m.zero_grad()
            (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, rtol=1e-6, atol=1e-8)
    for name, value in model.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), value)


class Calls:
    """Counts the calls of batch norms that are fused with a ReLU or an addition."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fused: list[str] = []
        kind = sg.nn.batch_norm._BatchNorm
        original = kind.forward

        def counted(
            module: Any, input: Tensor, residual: Tensor | None = None, activation: Any = None
        ) -> Tensor:
            name = fusion.operation(activation, residual is not None)
            if name:
                self.fused.append(name)
            return original(module, input, residual, activation)

        patch.setattr(fusion.BatchNorm, "forward", counted)

    def of(self, model: nn.Module, x: Tensor | None = None) -> list[str]:
        self.fused.clear()
        model(image() if x is None else x)
        return sorted(self.fused)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("kind", [Block, Derived])
@pytest.mark.parametrize("downsample", [None, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))])
def test_steps(kind: type[Block], downsample: nn.Module | None, calls: Calls) -> None:
    block = kind()
    if downsample is not None:
        block.downsample = copy.deepcopy(downsample)
    model, twin = pair(block)
    assert isinstance(twin, kind) and type(twin).__name__ == f"Fused{kind.__name__}"
    assert operations(twin) == sorted(FUSED) == calls.of(copy.deepcopy(twin))
    assert_same(model, twin)
    for again in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert type(again) is type(twin)
        assert torch.equal(again(image()), twin(image()))


def test_a_function(calls: Calls) -> None:
    sg.nn.register_block(Block, written)
    model, twin = pair(Block())
    assert calls.of(copy.deepcopy(twin)) == sorted(FUSED)
    assert_same(model, twin)
    assert operations(twin) == ["batch_norm_add_relu"] * 2
    twin.relu.register_forward_hook(lambda *_: None)
    assert calls.of(twin) == operations(twin) == []
    reasons = {f.reason for f in sg.nn.conversion_report(twin).findings}
    assert reasons == {
        "Block uses its own forward: its member 'relu' has hooks or a forward of its own"
    }


def replace(m: Any) -> None:
    m.relu = nn.GELU()


def lose(m: Any) -> None:
    m.drop = None
    m.forward_error = TypeError


def lose_what_may_be_none(m: Any) -> None:
    m.downsample = nn.Identity()
    m.downsample = None


def hook(name: str, register: str) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        getattr(m.get_submodule(name), register)(lambda *_: None)

    return change


def replace_forward(m: Any) -> None:
    m.relu.forward = torch.tanh


def replace_own_forward(m: Any) -> None:
    m.forward = torch.tanh


def use_a_function(m: Any) -> None:
    del m.relu
    m.relu = torch.tanh


def change_the_drop(m: Any) -> None:
    m.drop = nn.AvgPool2d(1)


def downsample_in_place(m: Any) -> None:
    m.downsample = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1).double())


def share(m: Any) -> None:
    m.downsample = nn.Sequential(nn.Conv2d(4, 4, 1).double(), m.bn2)


def activate(m: Any) -> None:
    m.bn1.activation = "relu" if isinstance(m.bn1, sg.nn.BatchNorm2d) else None


CHANGES: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "another activation": (replace, ["batch norm + add"]),
    "None": (lose, []),
    "None that may be": (lose_what_may_be_none, FUSED),
    "hook on ReLU": (hook("relu", "register_forward_hook"), []),
    "pre-hook on a convolution": (hook("conv1", "register_forward_pre_hook"), []),
    "backward hook": (hook("conv2", "register_full_backward_hook"), []),
    "backward pre-hook": (hook("conv2", "register_full_backward_pre_hook"), []),
    "replaced forward": (replace_forward, []),
    "own forward replaced": (replace_own_forward, []),
    "a function": (use_a_function, []),
    "a layer before the addition": (change_the_drop, ["batch norm + ReLU"]),
    "a shortcut that writes": (downsample_in_place, ["batch norm + ReLU"]),
    "a batch norm in both": (share, ["batch norm + ReLU"]),
    "an activation of its own": (activate, [ADD_RELU]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_looks_otherwise_does_what_is_written(change: str, calls: Calls) -> None:
    alter, expected = CHANGES[change]
    model, twin = pair(Block())
    torch.manual_seed(0)
    alter(model)
    torch.manual_seed(0)
    alter(twin)
    if change == "None":
        for m in (model, twin):
            with pytest.raises(TypeError, match="NoneType"):
                m(image())
        return
    assert calls.of(copy.deepcopy(twin)) == sorted(expected)
    if change == "a shortcut that writes":  # it overwrites what backward needs
        torch.testing.assert_close(twin(image()), model(image()))
    elif change != "own forward replaced":
        assert_same(model, twin)
    else:
        torch.testing.assert_close(twin(image()), torch.tanh(image()))


def test_hooks_in_the_shortcut_see_the_order_as_written() -> None:
    seen: list[str] = []
    block = Block()
    block.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    _, twin = pair(block)
    counted = twin.bn2.num_batches_tracked
    twin.downsample[0].register_forward_hook(lambda *_: seen.append(int(counted)))
    twin(image())
    assert seen == [1]


def test_a_call_with_keywords_takes_the_forward_as_written(calls: Calls) -> None:
    model, twin = pair(Block())
    torch.testing.assert_close(twin(x=image()), model(image()))
    calls.fused.clear()
    twin(x=image())
    assert calls.fused == []


def test_hooks_that_were_there_at_the_conversion_may_go(calls: Calls) -> None:
    block = Block()
    handle = block.conv1.register_forward_pre_hook(lambda *_: None)
    twin = sg.nn.convert_batchnorm(block.double())
    assert calls.of(twin) == operations(twin) == []
    assert "its member 'conv1' has hooks" in str(sg.nn.conversion_report(twin))
    handle.remove()
    assert calls.of(twin) == operations(twin) == sorted(FUSED)


def test_global_hooks(calls: Calls) -> None:
    _, twin = pair(Block())
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, _: seen.append(m))
    try:
        assert calls.of(twin) == []
    finally:
        handle.remove()
    assert seen.count(twin.relu) == 2 and twin.bn2 in seen
    assert calls.of(twin) == sorted(FUSED)


def test_a_class_whose_forward_is_exchanged_later(
    monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    _, twin = pair(Block())
    monkeypatch.setattr(Block, "forward", lambda self, x: x + 1)
    torch.testing.assert_close(twin(image()), image() + 1)
    again = sg.nn.convert_batchnorm(Block())
    assert type(again) is Block


def test_a_file_that_is_loaded_where_the_block_is_not_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, twin = pair(Block())
    file = pickle.dumps(twin)
    expected = twin(image())
    monkeypatch.setattr(known_blocks, "_REGISTERED", {})
    loaded = pickle.loads(file)
    assert type(loaded) is Block
    torch.testing.assert_close(loaded(image()), expected)


def test_what_is_registered_is_checked() -> None:
    with pytest.raises(TypeError, match=r"register_block: block: expected a subclass of"):
        sg.nn.register_block(Block(), STEPS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"register_block: forward: .*Steps or a function, got"):
        sg.nn.register_block(Block, "conv bn")  # type: ignore[arg-type]


def test_a_member_that_goes_after_the_conversion_is_told_in_the_report(calls: Calls) -> None:
    model, twin = pair(Block())
    for change, why in (
        (use_a_function, "its attribute 'relu' is no registered module"),
        (lambda m: delattr(m, "relu"), "it has no member 'relu'"),
        (lambda m: setattr(m, "relu", None), "its member 'relu' is None"),
    ):
        change(twin)
        reasons = {f.reason for f in sg.nn.conversion_report(twin).findings}
        assert reasons == {f"Block uses its own forward: {why}"}
    # A misspelt name with a question mark would drop the shortcut without a word.
    model, twin = pair(Block())
    model.downsample = twin.downsample = nn.Conv2d(4, 4, 1).double()
    vars(twin)["_modules"]["shortcut"] = twin._modules.pop("downsample")
    assert "it has no member 'downsample'" in str(sg.nn.conversion_report(twin))


def test_a_last_activation_with_a_question_mark_is_called(calls: Calls) -> None:
    steps = sg.nn.Steps("conv1 bn1 relu conv2 bn2", True, "drop", "downsample?", last="relu?")
    sg.nn.register_block(Block, steps)
    model, twin = pair(Block())
    assert calls.of(copy.deepcopy(twin)) == operations(twin) == sorted(FUSED)
    assert_same(model, twin)


def test_the_function_adds_what_does_not_fit_as_it_is_written() -> None:
    norm = sg.nn.convert_batchnorm(nn.BatchNorm2d(4)).eval()
    x = image().float()
    for residual in (torch.randn(4, 1, 1), torch.randn(2, 4, 6, 6, dtype=torch.float64)):
        actual = sg.nn.batch_norm_add_relu(norm, x, residual, F.relu)
        torch.testing.assert_close(actual, F.relu(norm(x) + residual))
    for relu6 in (F.relu6, nn.ReLU6(inplace=True)):
        actual = sg.nn.batch_norm_add_relu(norm, x, 9 * x, relu6)
        torch.testing.assert_close(actual, F.relu6(norm(x) + 9 * x))
    output = sg.nn.batch_norm_add_relu(norm, x, x, nn.GELU())
    torch.testing.assert_close(output, F.gelu(norm(x) + x))
    own = nn.Conv2d(4, 4, 1)
    torch.testing.assert_close(sg.nn.batch_norm_add_relu(own, x, x, F.relu), F.relu(own(x) + x))


@pytest.fixture(scope="module")
def libraries() -> Iterator[tuple[Any, Any]]:
    with vision("timm", "torchvision.models") as (timm, torchvision):
        yield timm, torchvision


def made(libraries: tuple[Any, Any], name: str) -> nn.Module:
    timm, torchvision = libraries
    torch.manual_seed(0)
    library, _, kind = name.partition(".")
    model = timm.create_model(kind) if library == "timm" else getattr(torchvision, kind)()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# The numbers of batch norms fused with ReLU or ReLU6, with an addition and ReLU, and with an addition; the others are
# added by another batch norm, or have another activation.
NETWORKS = {
    "timm.test_resnet": (8, 4, 0, 3),
    "timm.resnet18": (9, 8, 0, 3),
    "timm.resnet50": (33, 16, 0, 4),
    "timm.mobilenetv2_100": (35, 0, 10, 7),
    "timm.mnasnet_100": (35, 0, 10, 7),
    "timm.efficientnet_lite0": (33, 0, 9, 7),
    "timm.efficientnet_es": (31, 0, 12, 6),
    "torchvision.resnet18": (9, 8, 0, 3),
    "torchvision.resnet50": (33, 16, 0, 4),
    "torchvision.mobilenet_v2": (35, 0, 10, 7),
    "torchvision.mobilenet_v3_small": (5, 0, 6, 23),
    "torchvision.mnasnet1_0": (35, 0, 10, 7),
    "torchvision.vgg11_bn": (8, 0, 0, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_counts(libraries: tuple[Any, Any], name: str) -> None:
    report = sg.nn.conversion_report(sg.nn.convert_batchnorm(made(libraries, name)))
    found = report.operations
    counts = (
        found.get("batch norm + ReLU", 0) + found.get("batch norm + ReLU6", 0),
        found.get(ADD_RELU, 0),
        found.get("batch norm + add", 0),
    )
    assert (*counts, len(report.not_fused)) == NETWORKS[name], str(report)
    assert report.left == ()
    assert not any(finding.line for finding in report.findings), str(report)


@pytest.mark.parametrize(
    "name",
    ["timm.test_resnet", "timm.resnet18", "timm.mobilenetv2_100", "torchvision.mobilenet_v3_small"],
)
def test_networks_give_what_they_gave(libraries: tuple[Any, Any], name: str, calls: Calls) -> None:
    model, twin = pair(made(libraries, name))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    count = len(sg.nn.conversion_report(twin).fused)
    assert len(calls.of(copy.deepcopy(twin), x)) == count
    assert_same(model, twin, x)
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again(x), twin(x))


def test_another_version_is_not_fused(
    libraries: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (_, forward) in list(known_blocks._KNOWN.items()):
        monkeypatch.setitem(known_blocks._KNOWN, name, ("of another", forward))
    twin = sg.nn.convert_batchnorm(made(libraries, "timm.resnet18"))
    assert operations(twin) == []
    found = {f.name: f for f in sg.nn.conversion_report(twin).findings}["layer1.0.bn1"]
    assert found.reason == (
        "timm.models.resnet.BasicBlock.forward has another source than the version that is known"
    )
    left = sg.nn.conversion_report(sg.nn.convert_batchnorm(made(libraries, "timm.mobilenetv2_100")))
    assert len(left.left) == 52


def test_a_wrapped_forward_is_not_taken_for_the_known_one(
    libraries: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(libraries, "torchvision.resnet18")
    kind = type(model.layer1[0])
    original = kind.forward

    @functools.wraps(original)
    def doubled(self: Any, x: Tensor) -> Tensor:
        return 2 * original(self, x)

    monkeypatch.setattr(kind, "forward", doubled)
    twin = sg.nn.convert_batchnorm(copy.deepcopy(model.layer1[0]))
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(twin(x), model.layer1[0](x), rtol=1e-4, atol=1e-5)


def test_timms_batch_norm_with_an_activation(libraries: tuple[Any, Any], calls: Calls) -> None:
    from timm.layers import BatchNormAct2d

    for options, expected in (
        ({}, ["batch norm + ReLU"]),
        ({"act_layer": nn.ReLU6}, ["batch norm + ReLU6"]),
        ({"apply_act": False}, []),
        ({"act_layer": nn.SiLU}, []),
        ({"drop_layer": functools.partial(nn.AvgPool2d, 1)}, []),
    ):
        model, twin = pair(BatchNormAct2d(4, **options))
        assert isinstance(twin, BatchNormAct2d) and isinstance(twin, sg.nn.BatchNorm2d)
        assert calls.of(copy.deepcopy(twin)) == expected == operations(twin)
        assert_same(model, twin)
    twin.act.register_forward_hook(lambda *_: None)
    assert_same(model, twin)
    graph = torch.fx.symbolic_trace(nn.Sequential(twin)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


class Optional(nn.Module):
    """An addition only where an attribute says so, and a ReLU in both cases."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.relu(y + x if self.skip else y)


@pytest.mark.parametrize("skip", [True, False])
def test_an_addition_that_an_attribute_decides(skip: bool, calls: Calls) -> None:
    sg.nn.register_block(Optional, sg.nn.Steps("conv bn", add="skip", last="relu"))
    model, twin = pair(Optional(skip))
    assert calls.of(copy.deepcopy(twin)) == operations(twin) == [FUSED[skip]]
    assert_same(model, twin)
    model.skip = twin.skip = not skip
    assert calls.of(copy.deepcopy(twin)) == operations(twin) == [FUSED[not skip]]
    assert_same(model, twin)
