"""What convert_batchnorm keeps and fuses of batch norms and chains, and what its report says."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadygrad.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadygrad.nn.conversion_report import conversion_report
from steadygrad.nn.convert import convert_batchnorm

KINDS = [
    (nn.BatchNorm1d, BatchNorm1d, (6, 3)),
    (nn.BatchNorm2d, BatchNorm2d, (2, 3, 4, 4)),
    (nn.BatchNorm3d, BatchNorm3d, (2, 3, 2, 2, 2)),
]


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


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


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
        nn.Hardtanh(0.0, 6.0),
    ).double()
    twin = convert_batchnorm(copy.deepcopy(model))
    assert operations(twin) == [*["batch norm + ReLU"] * 2, "batch norm + ReLU6"]
    assert isinstance(twin, nn.Sequential) and list(twin.state_dict()) == list(model.state_dict())
    assert reason(twin, "7") == "it is followed by Hardtanh"
    assert_same(model, twin, batch())
    x = batch()
    torch.testing.assert_close(twin[:2](x), model[:2](x))
    torch.testing.assert_close(twin[3](x), model[3](x))
    for m in (model, twin):
        m[2] = nn.Tanh()
        m[6].max_val = 1.0  # no longer ReLU6
        m[8] = nn.ReLU()
    assert_same(model, twin, x)
    assert operations(twin) == ["batch norm + ReLU"] * 2
    torch.testing.assert_close(copy.deepcopy(twin)(x), twin(x))


@pytest.mark.parametrize(
    ("between", "fuses"),
    [
        (nn.Identity(), True),
        (nn.Dropout2d(0.0), True),
        (nn.Dropout(0.5).eval(), True),
        (nn.Sequential(nn.Identity(), nn.Dropout(0.0)), True),
        (nn.Dropout(0.5), False),
        (nn.Conv2d(3, 3, 1), False),
    ],
)
def test_what_does_nothing_between_a_batch_norm_and_its_relu(
    between: nn.Module, fuses: bool
) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), between, nn.ReLU()).double()
    twin = convert_batchnorm(copy.deepcopy(model))
    assert operations(twin) == ["batch norm + ReLU"] * fuses
    x = batch()
    for m in (model, twin):
        torch.manual_seed(1)
        m.output = m(x)
    torch.testing.assert_close(twin.output, model.output)


def test_a_dropout_that_becomes_active_is_called() -> None:
    model = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(1.0), nn.ReLU()).eval())
    x = batch(torch.float32)
    assert operations(model) == ["batch norm + ReLU"] and bool((model(x) != 0).any())
    model.train()
    assert operations(model) == [] and reason(model, "0") == "it is followed by Dropout"
    assert bool((model(x) == 0).all())


@pytest.mark.parametrize("hooked", [0, 1, 2])
@pytest.mark.parametrize("register", HOOKS)
def test_hooks_see_what_they_saw_before(hooked: int, register: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU()).double()
    twins = [copy.deepcopy(model), copy.deepcopy(model)]
    convert_batchnorm(twins[0])
    seen: list[list[Tensor]] = []
    for m in (model, *twins):
        seen.append([])

        def hook(_: nn.Module, *values: Any, to: list[Tensor] = seen[-1]) -> None:
            for value in values:
                to.append((value[0] if isinstance(value, tuple) else value).clone())

        getattr(m[hooked], register)(hook)
    convert_batchnorm(twins[1])
    x = batch()
    for m in (model, *twins):
        m(x.clone().requires_grad_()).square().sum().backward()
    for ours in seen[1:]:
        assert len(ours) == len(seen[0]) > 0
        for a, b in zip(ours, seen[0], strict=True):
            torch.testing.assert_close(a, b)
    assert operations(twins[0]) == operations(twins[1]) == []
    assert "hooks" in reason(twins[0], "0")


class Counted(nn.Sequential):
    """A chain with a call of its own."""

    calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return super().__call__(*args)


def test_a_chain_with_a_call_of_its_own_is_called() -> None:
    model = convert_batchnorm(nn.Sequential(Counted(nn.BatchNorm2d(3)), nn.ReLU()))
    model(batch(torch.float32))
    assert model[0].calls == 1 and operations(model) == []


def test_a_hook_that_comes_during_a_call_is_called() -> None:
    model = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    seen: list[nn.Module] = []
    model[0].register_forward_hook(
        lambda *_: model[2].register_forward_hook(lambda module, *_: seen.append(module)) and None
    )
    model(batch(torch.float32))
    assert seen == [model[2]]


def test_a_member_compiled_in_place_is_called() -> None:
    model = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    model[1]._compiled_call_impl = lambda x: torch.full_like(x, 7)
    assert bool((model(batch(torch.float32)) == 7).all())


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
    gc.collect()  # also frees the base classes, which the first collection has released
    assert [kind() for kind in left] == [None] * 4


def test_without_fuse_only_the_batch_norms_change() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    convert_batchnorm(model, fuse=False)
    assert type(model) is nn.Sequential and type(model[0]) is BatchNorm2d
    assert reason(model, "0") == "fuse was False"


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    conversion_report(convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))
    assert capsys.readouterr() == ("", "")
