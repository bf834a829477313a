"""convert_batchnorm on single modules: what it keeps, what it fuses, and when the original forward must run."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadygrad.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadygrad.nn.conversion_report import conversion_report
from steadygrad.nn.convert import convert_batchnorm

KINDS = [
    (nn.BatchNorm1d, BatchNorm1d, (6, 3)),
    (nn.BatchNorm2d, BatchNorm2d, (2, 3, 4, 4)),
    (nn.BatchNorm3d, BatchNorm3d, (2, 3, 2, 2, 2)),
]


class Block(nn.Module):
    """A batch norm, a ReLU and a body to test."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.flag = True
        self.body = body

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return type_free_call(self, x, scale)


def type_free_call(block: Block, x: Tensor, scale: float | None) -> Tensor:
    return block.body(block, x) if scale is None else block.body(block, x) * scale


def operations(model: nn.Module) -> list[str]:
    return [finding.operation for finding in conversion_report(model).fused]


def reason(model: nn.Module, name: str) -> str:
    (found,) = (f for f in conversion_report(model).findings if f.name == name)
    assert found.status != "fused"
    return found.reason


def assert_same(model: nn.Module, twin: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Check outputs, gradients and buffers in both modes, in float64."""
    for training in (True, False):
        model.train(training), twin.train(training)
        inputs = [[a.clone().requires_grad_() for a in args] for _ in range(2)]
        expected, actual = model(*inputs[0], **kwargs), twin(*inputs[1], **kwargs)
        torch.testing.assert_close(actual, expected)
        expected.square().sum().backward()
        actual.square().sum().backward()
        for ours, theirs in zip(inputs[1], inputs[0], strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
        for name, value in model.named_buffers():
            torch.testing.assert_close(twin.get_buffer(name), value)


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 5, 5, dtype=dtype)


@pytest.mark.parametrize(("theirs", "ours", "shape"), KINDS)
def test_the_module_stays_the_object_it_is(
    theirs: type[nn.Module], ours: type[nn.Module], shape: tuple[int, ...]
) -> None:
    norm = theirs(3, eps=1e-3, momentum=None).double().eval()
    norm.weight.requires_grad_(False)
    norm.qconfig = "kept"
    called: list[str] = []
    norm.register_forward_hook(lambda *_: called.append("hook"))
    before = dict(vars(norm))
    parameters = [norm.weight, norm.bias, norm.running_mean, norm.num_batches_tracked]
    assert convert_batchnorm(norm) is norm
    assert type(norm) is ours and isinstance(norm, theirs)
    assert {name: vars(norm)[name] for name in before} == before
    now = [norm.weight, norm.bias, norm.running_mean, norm.num_batches_tracked]
    assert all(a is b for a, b in zip(parameters, now, strict=True))
    norm(torch.randn(shape, dtype=torch.float64))
    assert called == ["hook"] and not norm.training


def test_shared_batch_norms_stay_shared() -> None:
    norm = nn.BatchNorm2d(3)
    model = convert_batchnorm(nn.ModuleList([norm, nn.Sequential(norm)]))
    assert model[0] is model[1][0] is norm and type(norm) is BatchNorm2d


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Extended(nn.BatchNorm2d):
    def doubled(self) -> Tensor:
        return 2 * self.weight


def test_what_is_left_alone_and_why() -> None:
    parametrized = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda input: input
    model = nn.ModuleDict(
        {
            "own": OwnForward(3),
            "lazy": nn.LazyBatchNorm2d(),
            "parametrized": parametrized,
            "replaced": replaced,
            "sync": nn.SyncBatchNorm(3),
        }
    )
    classes = [type(m) for m in model.values()]
    convert_batchnorm(model)
    assert [type(m) for m in model.values()] == classes
    assert len(conversion_report(model).left) == 5
    assert "forward of its own" in reason(model, "own")
    assert "lazy" in reason(model, "lazy")
    assert "parametrized" in reason(model, "parametrized")
    assert "replaced" in reason(model, "replaced")
    assert "process group" in reason(model, "sync")


def test_subclasses_keep_what_they_add() -> None:
    norm = convert_batchnorm(Extended(3))
    assert isinstance(norm, Extended) and isinstance(norm, BatchNorm2d)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(twin) is type(norm) and torch.equal(twin.doubled(), norm.doubled())
        assert twin(batch(torch.float32)).shape == (4, 3, 5, 5)


def test_only_modules_are_taken() -> None:
    for function in (convert_batchnorm, conversion_report):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
            function(3)


BODIES: dict[str, tuple[Callable[[Block, Tensor], Tensor], list[str]]] = {
    "module": (lambda m, x: m.relu(m.bn(m.conv(x))), ["batch norm + ReLU"]),
    "F.relu": (lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True), ["batch norm + ReLU"]),
    "torch.relu": (lambda m, x: torch.relu(m.bn(m.conv(x))), ["batch norm + ReLU"]),
    "relu_": (lambda m, x: m.bn(m.conv(x)).relu_(), ["batch norm + ReLU"]),
    "add": (lambda m, x: x + m.bn(m.conv(x)), ["batch norm + add"]),
    "torch.add": (
        lambda m, x: F.relu(torch.add(m.bn(m.conv(x)), x)),
        ["batch norm + add + ReLU"],
    ),
    "add_": (lambda m, x: m.bn(m.conv(x)).add_(x).relu(), ["batch norm + add + ReLU"]),
    "iadd": (
        lambda m, x: m.relu(operator.iadd(m.bn(m.conv(x)), x)),
        ["batch norm + add + ReLU"],
    ),
    "two batch norms": (
        lambda m, x: m.relu(m.bn(m.conv(x)) + m.other(x)),
        ["batch norm + add + ReLU"],
    ),
    "twice": (
        lambda m, x: m.relu(m.other(m.relu(m.bn(m.conv(x))))),
        ["batch norm + ReLU", "batch norm + ReLU"],
    ),
    "used twice": (lambda m, x: (lambda y: F.relu(y) + y)(m.bn(m.conv(x))), []),
    "in place into another": (lambda m, x: operator.iadd(x * 1, m.bn(m.conv(x))), []),
    "alpha": (lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2), []),
    "to itself": (lambda m, x: (lambda y: y + y)(m.bn(m.conv(x))), []),
    "number": (lambda m, x: F.relu(m.bn(m.conv(x)) + 1.0), []),
    "dropout": (lambda m, x: F.relu(F.dropout(m.bn(m.conv(x)), 0.0)), []),
    "ReLU6": (lambda m, x: F.relu6(m.bn(m.conv(x))), []),
    "input changes in between": (
        lambda m, x: (lambda h: (lambda y: y + h.mul_(2))(m.bn(h)))(m.conv(x)),
        [],
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_each_form(name: str) -> None:
    body, expected = BODIES[name]
    model = Block(body).double()
    twin = copy.deepcopy(model)
    convert_batchnorm(twin)
    assert operations(twin) == expected
    if name == "input changes in between":
        for m in (model, twin):
            m.eval()
        x = batch()
        with torch.no_grad():
            torch.testing.assert_close(twin(x), model(x))
        return
    assert_same(model, twin, batch())


def test_a_broadcast_or_wider_residual_is_added_as_written() -> None:
    model = Block(lambda m, x: F.relu(m.bn(m.conv(x)) + m.residual)).double()
    model.residual = nn.Parameter(torch.randn(3, 1, 1, dtype=torch.float64))
    twin = convert_batchnorm(copy.deepcopy(model))
    assert operations(twin) == ["batch norm + add + ReLU"]
    assert_same(model, twin, batch())
    model = Block(lambda m, x: F.relu(m.bn(m.conv(x)) + m.residual))
    model.residual = nn.Parameter(torch.randn(4, 3, 5, 5, dtype=torch.float64))
    twin = convert_batchnorm(copy.deepcopy(model))
    x = batch(torch.float32)
    assert twin(x).dtype == torch.float64
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_attribute_that_steers_the_forward_is_watched() -> None:
    model = Block(lambda m, x: m.relu(m.bn(m.conv(x))) if m.flag else m.bn(x) * 3).double()
    twin = convert_batchnorm(copy.deepcopy(model))
    assert operations(twin) == ["batch norm + ReLU"]
    assert_same(model, twin, batch())
    model.flag = twin.flag = False
    assert_same(model, twin, batch())


def test_both_modes_are_traced() -> None:
    def body(m: Block, x: Tensor) -> Tensor:
        return m.relu(m.bn(m.conv(x))) if m.training else m.bn(m.conv(x)) - 1

    model = Block(body).double()
    twin = convert_batchnorm(copy.deepcopy(model))
    assert operations(twin) == ["batch norm + ReLU"]
    assert_same(model, twin, batch())


def test_optional_arguments_take_the_original_forward() -> None:
    model = Block(BODIES["module"][0]).double()
    twin = convert_batchnorm(copy.deepcopy(model))
    assert_same(model, twin, batch(), scale=3.0)
    x = batch()
    torch.testing.assert_close(twin(x, 2.0), model(x, 2.0))
    torch.testing.assert_close(twin(x=x), model(x=x))


def test_a_replaced_activation_takes_effect() -> None:
    model = Block(BODIES["iadd"][0]).double()
    twin = convert_batchnorm(copy.deepcopy(model))
    model.relu, twin.relu = nn.GELU(), nn.GELU()
    assert_same(model, twin, batch())


@pytest.mark.parametrize("hooked", ["bn", "relu"])
def test_hooks_see_what_they_saw_before(hooked: str) -> None:
    model = Block(BODIES["iadd"][0]).double()
    twins = [copy.deepcopy(model), copy.deepcopy(model)]
    convert_batchnorm(twins[0])
    seen: list[list[Tensor]] = []
    for m in (model, *twins):
        seen.append([])
        m.get_submodule(hooked).register_forward_hook(
            lambda _, args, out, to=seen[-1]: to.extend((args[0].clone(), out.clone()))
        )
    convert_batchnorm(twins[1])
    assert operations(twins[0]) == []
    assert "hooks" in reason(twins[0], "bn")
    assert operations(twins[1]) == (["batch norm + add"] if hooked == "relu" else [])
    x = batch()
    for m in (model, *twins):
        m(x)
    for ours in seen[1:]:
        assert len(ours) == 2
        for a, b in zip(ours, seen[0], strict=True):
            torch.testing.assert_close(a, b)


UNTRACEABLE: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "depends on values": lambda m, x: m.relu(m.bn(x)) if x.sum() > 0 else m.bn(x),
    "without gradients": lambda m, x: m.relu(torch.no_grad()(m.bn)(x)),
    "random": lambda m, x: m.relu(m.bn(x)) * (torch.rand(1).item() + 1),
    "isinstance": lambda m, x: m.relu(m.bn(x)) if isinstance(x, Tensor) else x,
    "sets": lambda m, x: (setattr(m, "last", x), m.relu(m.bn(x)))[1],
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_a_graph_would_forget_is_not_traced(name: str) -> None:
    model = convert_batchnorm(Block(UNTRACEABLE[name]))
    assert operations(model) == [] and type(model) is Block
    assert "cannot be traced" in reason(model, "bn")
    assert not hasattr(model, "last")
    assert type(model.bn) is BatchNorm2d


def test_the_largest_parts_that_can_be_traced_are() -> None:
    model = Block(UNTRACEABLE["depends on values"])
    model.inner = Block(BODIES["add_"][0])
    model.chain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    convert_batchnorm(model)
    assert operations(model) == ["batch norm + add + ReLU", "batch norm + ReLU"]
    assert type(model) is Block and isinstance(model.inner, Block)


def test_chains() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        nn.ReLU(),
        nn.BatchNorm2d(3),
        nn.ReLU6(),
        nn.BatchNorm2d(3),
    ).double()
    twin = convert_batchnorm(copy.deepcopy(model))
    assert operations(twin) == ["batch norm + ReLU"] * 2
    assert isinstance(twin, nn.Sequential) and list(twin.state_dict()) == list(model.state_dict())
    assert reason(twin, "5") == "it is followed by ReLU6"
    assert_same(model, twin, batch())
    x = batch()
    torch.testing.assert_close(twin[:2](x), model[:2](x))
    torch.testing.assert_close(twin[3](x), model[3](x))
    for m in (model, twin):
        m[2] = nn.Tanh()
        m.append(nn.ReLU())
    assert_same(model, twin, x)
    assert operations(twin) == ["batch norm + ReLU"] * 2
    torch.testing.assert_close(copy.deepcopy(twin)(x), twin(x))


def test_classes_made_at_run_time_go_with_their_models() -> None:
    def classes() -> list[weakref.ref[type]]:
        class Norm(nn.BatchNorm2d):
            pass

        class Chain(nn.Sequential):
            pass

        model = convert_batchnorm(Chain(Norm(3), nn.ReLU()))
        assert type(convert_batchnorm(Chain(Norm(3), nn.ReLU()))) is type(model)
        return [weakref.ref(kind) for kind in (Norm, Chain, type(model), type(model[0]))]

    left = classes()
    gc.collect()
    gc.collect()  # the classes they derive from, which the first has set free
    assert [kind() for kind in left] == [None] * 4


def test_without_fuse_only_the_batch_norms_change() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Block(BODIES["iadd"][0]))
    convert_batchnorm(model, fuse=False)
    assert type(model) is nn.Sequential and type(model[2]) is Block
    assert type(model[0]) is type(model[2].bn) is BatchNorm2d
    assert reason(model, "0") == reason(model, "2.bn") == "fuse was False"


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    conversion_report(convert_batchnorm(Block(BODIES["iadd"][0])))
    assert capsys.readouterr() == ("", "")
