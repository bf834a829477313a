from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from steadygrad import reference
from tests.tolerances import assert_close, float64

STEPS = 25
SHAPES = [(5,), (3, 4), (), (2, 0)]

Case = tuple[str, dict[str, Any]]


def cases() -> Iterator[Case]:
    """Yield every combination of options that torch accepts, as (name in torch.optim, arguments)."""
    switch = [False, True]
    decay = [0.0, 0.1]
    for momentum, dampening, wd, nesterov, maximize in itertools.product(
        [0.0, 0.9], [0.0, 0.2], decay, switch, switch
    ):
        if not nesterov or (momentum > 0 and dampening == 0):
            yield (
                "SGD",
                dict(
                    lr=0.1,
                    momentum=momentum,
                    dampening=dampening,
                    weight_decay=wd,
                    nesterov=nesterov,
                    maximize=maximize,
                ),
            )
    for name, betas, wd, amsgrad, maximize in itertools.product(
        ["Adam", "AdamW"], [(0.9, 0.999), (0.3, 0.5), (0.0, 0.9)], decay, switch, switch
    ):
        yield (
            name,
            dict(
                lr=0.01,
                betas=betas,
                eps=1e-6,
                weight_decay=wd,
                amsgrad=amsgrad,
                maximize=maximize,
            ),
        )
    for wd in decay:
        yield "Adam", dict(lr=0.01, weight_decay=wd, decoupled_weight_decay=True)
    for lr_decay, wd, maximize in itertools.product([0.0, 0.05], decay, switch):
        yield (
            "Adagrad",
            dict(lr=0.1, lr_decay=lr_decay, weight_decay=wd, eps=1e-8, maximize=maximize),
        )
    for alpha, wd, momentum, centered, maximize in itertools.product(
        [0.99, 0.4], decay, [0.0, 0.9], switch, switch
    ):
        yield (
            "RMSprop",
            dict(
                lr=0.01,
                alpha=alpha,
                eps=1e-6,
                weight_decay=wd,
                momentum=momentum,
                centered=centered,
                maximize=maximize,
            ),
        )
    for betas, wd, maximize in itertools.product([(0.9, 0.999), (0.3, 0.5)], decay, switch):
        options = dict(lr=0.01, betas=betas, eps=1e-6, weight_decay=wd, maximize=maximize)
        yield "Adamax", options
        for decoupled in switch:
            yield "RAdam", dict(options, decoupled_weight_decay=decoupled)
            yield "NAdam", dict(options, decoupled_weight_decay=decoupled, momentum_decay=0.1)
    for rho, wd, maximize in itertools.product([0.9, 0.4], decay, switch):
        yield "Adadelta", dict(lr=0.5, rho=rho, eps=1e-5, weight_decay=wd, maximize=maximize)
    for t0, wd, maximize in itertools.product([1e6, 7.0], decay, switch):
        rates = dict(lr=0.1, lambd=0.01, alpha=0.6, t0=t0)
        yield "ASGD", dict(rates, weight_decay=wd, maximize=maximize)
    for etas, step_sizes, maximize in itertools.product(
        [(0.5, 1.2), (0.3, 2.0)], [(1e-6, 50.0), (0.008, 0.02)], switch
    ):
        yield "Rprop", dict(lr=0.01, etas=etas, step_sizes=step_sizes, maximize=maximize)


CASES = list(cases())
# The rules that torch has; Lion has tests of its own.
TORCH_RULES = [name for name in reference.rules.RULES if name != "Lion"]


def name_of(case: Case) -> str:
    name, options = case
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


@pytest.fixture(autouse=True)
def float64_scalars() -> Iterator[None]:
    """Make torch keep the numbers of NAdam's and ASGD's states in float64, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Pair:
    """The same parameters under a torch optimizer and under the reference's rule."""

    def __init__(self, name: str, options: dict[str, Any], rng: np.random.Generator) -> None:
        self.rule = reference.rules.RULES[name]
        self.params = [rng.normal(size=shape) for shape in SHAPES]
        self.tensors = [torch.nn.Parameter(torch.tensor(param)) for param in self.params]
        self.optimizer = getattr(torch.optim, name)(self.tensors, **options)
        # Only Adagrad has state before the first step.
        self.states = [
            {key: float64(value) for key, value in self.optimizer.state[tensor].items()}
            for tensor in self.tensors
        ]
        self.options = options

    def step(self, grads: list[NDArray[np.float64] | None], **options: Any) -> None:
        options = {**self.options, **options}
        options.pop("initial_accumulator_value", None)
        for i, grad in enumerate(grads):
            self.tensors[i].grad = None if grad is None else torch.tensor(grad)
            if grad is not None:
                self.params[i], self.states[i] = self.rule(
                    self.params[i], grad, self.states[i], **options
                )
        self.optimizer.param_groups[0].update(options)
        self.optimizer.step()

    def check(self) -> None:
        for param, state, tensor in zip(self.params, self.states, self.tensors, strict=True):
            assert_close(param, tensor, torch.float64)
            expected = self.optimizer.state[tensor]
            assert set(state) == set(expected)
            for key, value in expected.items():
                assert_close(state[key], value, torch.float64)


def grads_with_gaps(step: int, rng: np.random.Generator) -> list[NDArray[np.float64] | None]:
    """Return gradients; the first one exists at all steps, the others are None at some."""
    return [
        None if i and (step + i) % 3 == 0 else rng.normal(size=shape)
        for i, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_rule_equals_torch(case: Case, rng: np.random.Generator) -> None:
    pair = Pair(*case, rng)
    for step in range(STEPS):
        pair.step(grads_with_gaps(step, rng))
        pair.check()


@pytest.mark.parametrize("name", TORCH_RULES)
def test_defaults_equal_torch(name: str, rng: np.random.Generator) -> None:
    pair = Pair(name, {"lr": 0.02}, rng)
    for step in range(STEPS):
        pair.step(grads_with_gaps(step, rng))
    pair.check()


def test_adagrad_initial_accumulator_value(rng: np.random.Generator) -> None:
    pair = Pair("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.3}, rng)
    for step in range(STEPS):
        pair.step(grads_with_gaps(step, rng))
    pair.check()
    assert (pair.states[0]["sum"] > 0.3).all()


def test_adagrad_without_state_starts_from_zero() -> None:
    param, state = reference.rules.adagrad([1.0], [2.0], {}, lr=0.5, eps=0.0)
    assert param.tolist() == [0.5]
    assert {key: value.tolist() for key, value in state.items()} == {"step": 1.0, "sum": [4.0]}


@pytest.mark.parametrize("name", TORCH_RULES)
def test_hyperparameters_may_change_between_steps(name: str, rng: np.random.Generator) -> None:
    pair = Pair(name, {"lr": 0.1}, rng)
    for step in range(STEPS):
        options = {} if name == "Rprop" else {"weight_decay": 0.01 * step}
        pair.step(grads_with_gaps(step, rng), lr=0.1 / (step + 1), **options)
    pair.check()


def test_sgd_momentum_switched_on_late(rng: np.random.Generator) -> None:
    pair = Pair("SGD", {"lr": 0.1, "dampening": 0.5}, rng)
    for momentum in [0.0, 0.9, 0.9, 0.0, 0.9]:
        pair.step(grads_with_gaps(0, rng), momentum=momentum)
        pair.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200, 5e-324])
@pytest.mark.parametrize("name", TORCH_RULES)
def test_extreme_gradients_equal_torch(name: str, value: float, rng: np.random.Generator) -> None:
    pair = Pair(name, {"lr": 0.1}, rng)
    for _ in range(3):
        pair.step([np.full(shape, value) for shape in SHAPES])
        pair.check()
        pair.step([rng.normal(size=shape) for shape in SHAPES])
        pair.check()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "RMSprop"])
def test_zero_gradient_without_eps_is_nan_as_in_torch(name: str, rng: np.random.Generator) -> None:
    pair = Pair(name, {"lr": 0.1, "eps": 0.0}, rng)
    pair.step([np.zeros(shape) for shape in SHAPES])
    pair.check()
    assert np.isnan(pair.params[0]).all()


@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_rule_does_not_write_its_inputs(case: Case, rng: np.random.Generator) -> None:
    name, options = case
    rule = reference.rules.RULES[name]
    param, grad = rng.normal(size=7), rng.normal(size=7)
    state: reference.rules.State = {}
    for array in (param, grad):
        array.setflags(write=False)
    for _ in range(3):
        before = dict(state)
        new_param, new_state = rule(param, grad, state, **options)
        assert state == before and all(state[key] is before[key] for key in state)
        assert not any(np.shares_memory(grad, value) for value in [new_param, *new_state.values()])
        state = new_state
        for value in state.values():
            value.setflags(write=False)


def test_lower_precision_inputs_are_computed_in_float64() -> None:
    param, grad = np.ones(1, dtype=np.float32), np.ones(1, dtype=np.float32)
    new_param, state = reference.rules.sgd(param, grad, {}, lr=1e-12, momentum=0.9)
    assert new_param.dtype == state["momentum_buffer"].dtype == np.float64
    assert new_param[0] == 1.0 - 1e-12


def test_lion_by_hand() -> None:
    lion = reference.rules.lion
    options: dict[str, Any] = {"lr": 0.5, "betas": (0.5, 0.75), "weight_decay": 0.1}
    param, state = lion([2.0, -1.0, 3.0], [4.0, -2.0, 0.0], {}, **options)
    # 2 * 0.95 - 0.5, -1 * 0.95 + 0.5, 3 * 0.95
    assert param.tolist() == pytest.approx([1.4, -0.45, 2.85])
    assert {key: value.tolist() for key, value in state.items()} == {"exp_avg": [1.0, -0.5, 0.0]}
    # The average still outweighs a small gradient of the other sign.
    param, state = lion(param, [-0.5, 2.0, 1.0], state, **options)
    assert param.tolist() == pytest.approx([1.33 - 0.5, -0.4275 - 0.5, 2.7075 - 0.5])
    assert state["exp_avg"].tolist() == [0.625, 0.125, 0.25]


def test_lion_turns_round_where_it_maximizes(rng: np.random.Generator) -> None:
    param, grad = rng.normal(size=5), rng.normal(size=5)
    up, _ = reference.rules.lion(param, grad, {}, lr=0.1, maximize=True)
    down, _ = reference.rules.lion(param, -grad, {}, lr=0.1)
    assert np.array_equal(up, down) and not np.array_equal(up, param)
