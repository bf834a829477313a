"""restore_batchnorm gives torch's modules back, with the same tensors, and torch's tools work on them."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping, get_default_qconfig, quantize_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval

import steadygrad as sg


class Net(nn.Module):
    """A chain, a block of its own and a subclass, in code that TorchScript accepts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.relu(self.bn(self.conv(x)))


class Named(nn.BatchNorm2d):
    """A subclass without a forward of its own."""


def image() -> Tensor:
    return torch.linspace(-2, 3, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)


def trained(model: nn.Module) -> nn.Module:
    for _ in range(2):
        model(image())
    return model.eval()


def restored() -> nn.Module:
    torch.manual_seed(0)
    model = sg.nn.convert_batchnorm(Net())
    assert type(model.stem).__name__ == "FusedSequential"
    trained(model)
    return sg.nn.restore_batchnorm(model)


def held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("fuse", [True, False])
def test_everything_is_as_it_was(fuse: bool) -> None:
    model = nn.Sequential(Net(), Named(4), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    called: list[nn.Module] = []
    model[0].bn.register_forward_hook(lambda module, *_: called.append(module))
    kinds = [type(module) for module in model.modules()]
    keys = [set(vars(module)) for module in model.modules()]
    modules, tensors = list(model.modules()), held(model)
    sg.nn.convert_batchnorm(model, fuse=fuse)
    assert [type(module) for module in model.modules()] != kinds
    expected = model.eval()(image())
    assert sg.nn.restore_batchnorm(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == keys
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(tensors, held(model), strict=True))
    torch.testing.assert_close(model(image()), expected)
    assert len(called) == 2
    sg.nn.convert_batchnorm(model, fuse=fuse)
    torch.testing.assert_close(model(image()), expected)


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_batch_norm_itself(kind: int) -> None:
    theirs = getattr(nn, f"BatchNorm{kind}d")
    norm = getattr(sg.nn, f"BatchNorm{kind}d")(3, eps=1e-3, momentum=None, affine=False).eval()
    assert sg.nn.restore_batchnorm(norm) is norm and type(norm) is theirs
    assert repr(norm) == repr(theirs(3, eps=1e-3, momentum=None, affine=False))
    assert set(vars(norm)) == set(vars(theirs(3))) and not norm.training


@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("relu6", nn.ReLU6)])
def test_an_activation_becomes_a_module(activation: Any, kind: type[nn.Module]) -> None:
    norm = sg.nn.BatchNorm2d(4, activation=activation)
    nn.init.constant_(norm.weight, 9.0)
    model = nn.ModuleDict({"a": norm, "b": norm, "c": nn.Sequential(nn.Identity(), norm)})
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _, args, output: seen.append(output))
    x = torch.randn(2, 4, 3, 3)
    for _ in range(2):
        norm(x)
    norm.eval()
    expected, tensors = norm(x), held(norm)
    sg.nn.restore_batchnorm(model)
    assert model["a"] is model["b"] is model["c"][1] is norm
    assert [type(module) for module in norm.modules()] == [nn.Sequential, nn.BatchNorm2d, kind]
    assert not any(module.training for module in norm.modules())
    assert all(a is b for a, b in zip(tensors, held(norm), strict=True))
    seen.clear()
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(seen, [expected])
    handle.remove()
    norm(x)
    assert len(seen) == 1 and norm[0].eps == 1e-5
    sg.nn.convert_batchnorm(model)
    torch.testing.assert_close(norm(x), expected)


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_synchronized_ones() -> None:
    group = dist.new_group([0])
    models = [
        sg.nn.convert_batchnorm(nn.SyncBatchNorm(3)),
        sg.nn.convert_batchnorm(nn.BatchNorm2d(3), process_group=group),
        sg.nn.convert_batchnorm(nn.BatchNorm2d(3), process_group=dist.group.WORLD),
        sg.nn.BatchNorm2d(3, process_group=group, activation="relu"),
    ]
    for model, expected in zip(models, [None, group, None, group], strict=True):
        sg.nn.restore_batchnorm(model)
        norm = model[0] if isinstance(model, nn.Sequential) else model
        assert type(norm) is nn.SyncBatchNorm and norm.process_group is expected
        assert set(vars(norm)) == set(vars(nn.SyncBatchNorm(3)))
        model.eval()(torch.randn(2, 3, 4, 4))


class Own(sg.nn.BatchNorm2d):
    """A class that was never converted."""


def test_what_cannot_be_restored_changes_nothing() -> None:
    parametrized = sg.nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    for norm in (Own(3), parametrized):
        model = sg.nn.convert_batchnorm(
            nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(norm))
        )
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(
            ValueError, match=r"restore_batchnorm: 2\.0: expected a class that conv"
        ):
            sg.nn.restore_batchnorm(model)
        assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(TypeError, match=r"restore_batchnorm: model: expected a torch\.nn\.Module"):
        sg.nn.restore_batchnorm(3)


def test_torch_export() -> None:
    model = restored()
    program = torch.export.export(model, (image(),))
    torch.testing.assert_close(program.module()(image()), model(image()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript() -> None:
    model = restored()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(image()), model(image()))


def test_folding_into_convolutions() -> None:
    model = restored()
    expected = model(image())
    folded = fuse_conv_bn_eval(model.conv, model.bn)
    torch.testing.assert_close(
        folded(torch.ones(1, 4, 2, 2)), model.bn(model.conv(torch.ones(1, 4, 2, 2)))
    )
    fused = torch.ao.quantization.fuse_modules(
        model, [["stem.0", "stem.1", "stem.2"], ["conv", "bn", "relu"]]
    )
    assert type(fused.bn) is nn.Identity
    torch.testing.assert_close(fused(image()), expected)


@pytest.mark.filterwarnings("ignore")  # the quantizer is deprecated
def test_quantization_after_training() -> None:
    model = restored()
    mapping = QConfigMapping().set_global(get_default_qconfig("fbgemm"))
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (image(),))
    prepared(image())
    quantized = quantize_fx.convert_fx(prepared)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quantized.modules())
    assert (quantized(image()) - model(image())).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore")  # the exporters give warnings
def test_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    model = restored()
    file = io.BytesIO()
    torch.onnx.export(model, (image(),), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue())
    run = pytest.importorskip("onnx.reference").ReferenceEvaluator(graph)
    (got,) = run.run(None, {graph.graph.input[0].name: image().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(image()).detach())
