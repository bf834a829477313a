"""Optimizers: wrong arguments, wrong hyper-parameters, wrong tensors; a refusal changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.optimizer_kinds import MAKERS, give
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import Snapshot, assert_refused
from tests.tolerances import assert_close

REFUSALS = (TypeError, ValueError, RuntimeError)
NON_NEGATIVE = "non-negative|nonnegative|>= ?0|at least 0|not negative"
WHERE = "step|Stabilizer"
all_kinds = pytest.mark.parametrize("kind", MAKERS)
# For each hyper-parameter, the fused rules that read it.
READ_BY = {
    "lr": ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"],
    "weight_decay": ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"],
    "eps": ["Adam", "AdamW", "Adagrad", "RMSprop"],
    "momentum": ["SGD", "RMSprop"],
    "alpha": ["RMSprop"],
    "lr_decay": ["Adagrad"],
}


@pytest.mark.parametrize(
    "wrong", [torch.nn.Linear(2, 2), None, "adam", torch.optim.SGD, 3, [torch.ones(2)]], ids=repr
)
def test_what_is_no_optimizer_is_refused(wrong: object) -> None:
    assert_refused(
        lambda: sg.Stabilizer(wrong, max_norm=1.0),  # type: ignore[arg-type]
        TypeError,
        function="Stabilizer",
        argument="optimizer",
        expected=r"expected.*Optimizer",
        got=f"got.*{type(wrong).__name__}",
    )


@pytest.mark.parametrize("made", ["wrapped", "subclass"])
@pytest.mark.parametrize(
    ("argument", "known"),
    [
        ("penalty_order", "before_clip.*after_clip"),
        ("l1_mode", "subgradient.*proximal"),
        ("clip_scope", "global.*group.*tensor"),
        ("nonfinite", "skip.*zero.*raise.*propagate"),
    ],
)
def test_unknown_policies_are_refused(made: str, argument: str, known: str) -> None:
    params = dense_parameters()
    inner = torch.optim.SGD(params, lr=0.1)
    before = [dict(group) for group in inner.param_groups]
    # None is allowed for the scope, which the clip policy then chooses.
    for wrong in ("sometimes", "", 1 if argument == "clip_scope" else None, 1):
        assert_refused(
            lambda wrong=wrong: (
                sg.Stabilizer(inner, **{argument: wrong})
                if made == "wrapped"
                else sg.optim.SGD(params, lr=0.1, **{argument: wrong})
            ),
            (TypeError, ValueError),
            function="Stabilizer|SGD",
            argument=argument,
            expected=known,
            got=f"got.*{wrong!r}",
        )
    assert [dict(group) for group in inner.param_groups] == before


@pytest.mark.parametrize("value", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize("argument", ["max_norm", "clip_value", "l1", "l2"])
@all_kinds
def test_bad_limits_are_refused_by_the_constructor(kind: str, argument: str, value: float) -> None:
    params = dense_parameters()
    assert_refused(
        lambda: MAKERS[kind](params, **{argument: value}),
        ValueError,
        function="Stabilizer|AdamW",
        argument=argument,
        expected=NON_NEGATIVE,
        got=f"got.*{value}",
        unchanged=[Snapshot(params)],
    )


@pytest.mark.parametrize("value", [-1.0, math.nan])
@pytest.mark.parametrize("argument", ["max_norm", "clip_value", "l1", "l2"])
@all_kinds
def test_bad_limits_set_later_are_refused_by_the_step(
    backend: Backend, kind: str, argument: str, value: float
) -> None:
    params = dense_parameters(device=backend.device)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = MAKERS[kind](groups, max_norm=1.0)
    for warm in (False, True):
        optimizer.param_groups[1][argument] = 1.0 if argument == "max_norm" else 0.0
        give(params)
        if warm:
            optimizer.step()
        optimizer.param_groups[1][argument] = value
        assert_refused(
            optimizer.step,
            ValueError,
            function=WHERE,
            argument=argument,
            expected=NON_NEGATIVE,
            got=f"got.*{value}",
            unchanged=[Snapshot(params, optimizer)],
        )


@pytest.mark.parametrize("value", [-1.0, math.nan])
@pytest.mark.parametrize(
    ("argument", "rule"), [(name, rule) for name, rules in READ_BY.items() for rule in rules]
)
def test_bad_hyper_parameters_set_later_are_refused_by_the_step(
    backend: Backend, argument: str, rule: str, value: float
) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(unfused.optimizer_class(rule)(params), max_norm=1.0)
    good = optimizer.param_groups[0][argument]
    for warm in (False, True):
        optimizer.param_groups[0][argument] = good
        give(params)
        if warm:
            optimizer.step()
        optimizer.param_groups[0][argument] = value
        assert_refused(
            optimizer.step,
            ValueError,
            function=WHERE,
            argument=rf"\b{argument}\b",
            expected=NON_NEGATIVE,
            got=f"got.*{value}",
            unchanged=[Snapshot(params, optimizer)],
        )


@pytest.mark.parametrize("argument", ["lr", "weight_decay", "max_norm", "l2"])
def test_numbers_as_text_are_refused(backend: Backend, argument: str) -> None:
    # YAML reads 1e-3 as text.
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(torch.optim.SGD(params), max_norm=1.0)
    give(params)
    optimizer.param_groups[0][argument] = "1e-3"
    assert_refused(
        optimizer.step,
        TypeError,
        function=WHERE,
        argument=rf"\b{argument}\b",
        expected="a finite number|a number",
        got="got '1e-3'",
        unchanged=[Snapshot(params, optimizer)],
    )
    with pytest.raises(TypeError, match="max_norm"):
        sg.Stabilizer(torch.optim.SGD(params), max_norm="1e-3")  # type: ignore[arg-type]


@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, -0.1), (math.nan, 0.9), (0.9, 1.5)])
@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
def test_bad_betas_set_later_are_refused_by_the_step(
    backend: Backend, rule: str, betas: tuple[float, float]
) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(unfused.optimizer_class(rule)(params), max_norm=1.0)
    optimizer.param_groups[0]["betas"] = betas
    give(params)
    wrong = next(b for b in betas if not 0 <= b < 1)
    assert_refused(
        optimizer.step,
        ValueError,
        function=WHERE,
        argument="beta",
        expected="< ?1|below 1|less than 1",
        got=f"got.*{wrong}",
        unchanged=[Snapshot(params, optimizer)],
    )


@pytest.mark.parametrize("value", ["fast", None, torch.ones(2)], ids=["text", "None", "vector"])
def test_a_rate_that_is_no_number_is_refused(backend: Backend, value: Any) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(torch.optim.AdamW(params), max_norm=1.0)
    give(params)
    good, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], value
    snapshot = Snapshot(params)
    with pytest.raises((TypeError, ValueError), match="lr"):
        optimizer.step()
    snapshot.assert_unchanged()
    optimizer.param_groups[0]["lr"] = good
    optimizer.step()


def refuse_step(
    params: list[Parameter], optimizer: Any, whole: list[Parameter], **message: str
) -> None:
    """Assert that the step is refused and leaves ``whole`` and all state as they were."""
    counters = (optimizer.skipped_steps, optimizer.clipped_steps)
    assert_refused(
        optimizer.step,
        REFUSALS,
        function=WHERE,
        unchanged=[Snapshot(whole)],
        **message,
    )
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == counters


# Without a penalty the in-place path does not read parameters, so it checks only gradients.
@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("SGD", "parameter"),
        ("SGD", "gradient"),
        ("AdamW", "parameter"),
        ("AdamW", "gradient"),
        ("NAdam", "gradient"),
    ],
)
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
def test_memory_freed_under_us(backend: Backend, rule: str, warm: bool, what: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(unfused.optimizer_class(rule)(params, lr=0.1), max_norm=1.0)
    give(params)
    if warm:
        optimizer.step()
        give(params, 1)
    freed = params[2] if what == "parameter" else params[2].grad
    assert freed is not None
    freed.untyped_storage().resize_(0)
    refuse_step(
        params,
        optimizer,
        [p for p in params if p is not params[2]],
        argument="param|grad",
        expected="memory|storage",
        got="freed|null|released",
    )


def test_state_freed_under_us(backend: Backend) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(torch.optim.AdamW(params, lr=0.1), max_norm=1.0)
    give(params)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"].untyped_storage().resize_(0)
    refuse_step(
        params,
        optimizer,
        params,
        argument="exp_avg|state",
        expected="memory|storage",
        got="freed|null|released",
    )


@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Adagrad"])
def test_a_parameter_of_another_shape_under_its_gradient(
    backend: Backend, rule: str, warm: bool
) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(unfused.optimizer_class(rule)(params, lr=0.1), max_norm=1.0)
    give(params)
    if warm:
        optimizer.step()
        give(params, 1)
    params[2].data = torch.ones(4, 4, device=backend.device)
    refuse_step(params, optimizer, params, argument="grad|param|state", expected="4", got="5")


@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "later-step"])
def test_a_parameter_of_another_dtype_under_its_gradient(backend: Backend, warm: bool) -> None:
    params = dense_parameters(device=backend.device)
    exact = dense_parameters(torch.float64, backend.device)
    with torch.no_grad():
        for one, other in zip(exact, params, strict=True):
            one.copy_(other)
    optimizer = sg.Stabilizer(torch.optim.AdamW(params, lr=0.1), max_norm=1.0)
    torchs = torch.optim.AdamW(exact, lr=0.1)
    for step in range(1 + warm):
        give(params, step)
        for one, other in zip(exact, params, strict=True):
            assert other.grad is not None
            one.grad = other.grad.double()
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        torchs.step()
        if step == warm:
            params[2].data = params[2].data.double()
        snapshot = Snapshot(params)
        try:
            optimizer.step()
        except REFUSALS as refusal:
            assert step == warm and "float64" in str(refusal) and "float32" in str(refusal)
            snapshot.assert_unchanged()
            return
    for one, other in zip(params, exact, strict=True):
        assert_close(one, other, torch.float32)


def test_state_of_another_shape(backend: Backend) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(torch.optim.AdamW(params, lr=0.1), max_norm=1.0)
    give(params)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(3, device=backend.device)
    snapshot = Snapshot(params, optimizer)
    with pytest.raises(REFUSALS):
        optimizer.step()
    snapshot.assert_unchanged()


@pytest.mark.parametrize("rule", ["Adam", "AdamW", "RMSprop"])
def test_sparse_gradients_that_the_rule_does_not_take(backend: Backend, rule: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = sg.Stabilizer(unfused.optimizer_class(rule)(params, lr=0.1), max_norm=1.0)
    give(params)
    assert params[2].grad is not None
    params[2].grad = (params[2].grad * 100).to_sparse()
    snapshot = Snapshot(params, optimizer)
    with pytest.raises(REFUSALS, match="sparse"):
        optimizer.step()
    snapshot.assert_unchanged()


@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Adadelta"])
def test_a_parameter_on_another_device(backend: Backend, rule: str) -> None:
    params = dense_parameters(device=backend.device)
    other = Parameter(torch.ones(3, device="meta"))
    other.grad = torch.ones(3, device="meta")
    kind = unfused.optimizer_class(rule)
    optimizer = sg.Stabilizer(kind([*params, other], lr=0.1), max_norm=1.0)
    give(params)
    refuse_step(params, optimizer, params, argument="grad|param", expected="cpu", got="meta")


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_a_fake_parameter(backend: Backend, rule: str) -> None:
    params = dense_parameters(device=backend.device)
    with FakeTensorMode():
        fake = Parameter(torch.ones(3))
        fake.grad = torch.ones(3)
    optimizer = sg.Stabilizer(unfused.optimizer_class(rule)([*params, fake], lr=0.1), max_norm=1.0)
    give(params)
    refuse_step(
        params,
        optimizer,
        params,
        argument="grad|param",
        expected=r"torch\.Tensor",
        got="FakeTensor",
    )


@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Adadelta"])
def test_an_inference_parameter(backend: Backend, rule: str) -> None:
    params = dense_parameters(device=backend.device)
    with torch.inference_mode():
        frozen = torch.ones(3, device=backend.device)
    inner = unfused.optimizer_class(rule)(params, lr=0.1)
    optimizer = sg.Stabilizer(inner, max_norm=1.0)
    params[1] = inner.param_groups[0]["params"][1] = frozen  # type: ignore[call-overload]
    give(params)
    refuse_step(params, optimizer, params, argument="param", expected="expected", got="inference")
    assert torch.all(frozen == 1.0)
