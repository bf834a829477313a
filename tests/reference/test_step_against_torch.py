from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from steadygrad import reference
from steadygrad.reference.step import Group, StepOptions, step
from tests.tolerances import assert_close

Array = NDArray[np.float64]
Grads = list[Array | None]

INF = math.inf
STEPS = 20
SHAPES = [(5,), (3, 4), (), (2, 3)]
NONFINITE = [math.nan, INF, -INF]
RULES = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.05, "amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1},
    "RMSprop": {"lr": 0.05, "momentum": 0.5, "centered": True},
}


def random_grads(rng: np.random.Generator, step_number: int = 0) -> Grads:
    return [
        None if i and (step_number + i) % 4 == 0 else 3 * rng.normal(size=shape)
        for i, shape in enumerate(SHAPES)
    ]


class TorchStep:
    """The same step, composed of torch's own functions."""

    def __init__(self, params: list[Array], groups: list[Group], options: StepOptions) -> None:
        self.params = [torch.nn.Parameter(torch.tensor(param)) for param in params]
        self.groups, self.options = groups, options
        torch_groups = [
            {"params": [self.params[i] for i in group.params], **group.hyper} for group in groups
        ]
        self.optimizer = getattr(torch.optim, options.rule)(torch_groups)

    def step(self, grads: Grads, grad_scale: float = 1.0) -> torch.Tensor:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else torch.tensor(grad) / grad_scale
        if self.options.penalty_order == "before_clip":
            self._add_penalties()
        norm = self._norm(self.params)
        scope_norms = [self._norm(self._scope(group, param)) for group, param in self._members()]
        for (group, param), scope_norm in zip(self._members(), scope_norms, strict=True):
            if group.max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(param, group.max_norm, scope_norm)
            if group.clip_value is not None:
                torch.nn.utils.clip_grad_value_(param, group.clip_value)
        if self.options.penalty_order == "after_clip":
            self._add_penalties()
        self.optimizer.step()
        if self.options.l1_mode == "proximal":
            for group, param in self._members():
                amount = group.hyper["lr"] * group.l1
                param.data.copy_(torch.nn.functional.softshrink(param.data, amount))
        return norm

    def _members(self) -> list[tuple[Group, torch.nn.Parameter]]:
        """Return the parameters that have a gradient, each with its group."""
        members = [(group, self.params[i]) for group in self.groups for i in group.params]
        return [(group, param) for group, param in members if param.grad is not None]

    def _scope(self, group: Group, param: torch.nn.Parameter) -> list[torch.nn.Parameter]:
        members = [self.params[i] for i in group.params]
        return {"global": self.params, "group": members, "tensor": [param]}[self.options.clip_scope]

    def _norm(self, params: list[torch.nn.Parameter]) -> torch.Tensor:
        grads = [param.grad for param in params if param.grad is not None]
        return torch.nn.utils.get_total_norm(grads, self.options.norm_type)

    def _add_penalties(self) -> None:
        for group, param in self._members():
            l1 = group.l1 if self.options.l1_mode == "subgradient" else 0.0
            penalty = l1 * param.abs().sum() + group.l2 / 2 * param.square().sum()
            penalty.backward()


def two_groups(rule: str) -> list[Group]:
    return [
        Group([0, 2], RULES[rule], max_norm=1.0, l1=0.1, l2=0.2),
        Group([3, 1], {**RULES[rule], "lr": 0.01}, max_norm=2.5, clip_value=0.7, l1=0.3),
    ]


def check_against_torch(
    options: StepOptions, rng: np.random.Generator, grad_scale: float = 1.0
) -> None:
    params: list[Array] = [rng.normal(size=shape) for shape in SHAPES]
    states: list[reference.rules.State] = [{} for _ in params]
    groups = two_groups(options.rule)
    witness = TorchStep(params, groups, options)
    for number in range(STEPS):
        grads = [None if grad is None else grad_scale * grad for grad in random_grads(rng, number)]
        result = step(params, grads, states, groups, options, grad_scale)
        assert_close(result.norm, witness.step(grads, grad_scale), torch.float64)
        assert not result.skipped
        params, states = result.params, result.states
        for param, grad, tensor in zip(params, result.grads, witness.params, strict=True):
            assert_close(param, tensor, torch.float64)
            assert (grad is None) == (tensor.grad is None)
            if grad is not None:
                assert_close(grad, tensor.grad, torch.float64)


@pytest.mark.parametrize("clip_scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("l1_mode", ["subgradient", "proximal"])
@pytest.mark.parametrize("penalty_order", ["before_clip", "after_clip"])
@pytest.mark.parametrize("rule", RULES)
def test_step_equals_torch(
    rule: str, penalty_order: str, l1_mode: str, clip_scope: str, rng: np.random.Generator
) -> None:
    options = StepOptions(rule, penalty_order, l1_mode, clip_scope)
    check_against_torch(options, rng, grad_scale=1024.0)


@pytest.mark.parametrize("clip_scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("norm_type", [1.0, 0.5, 3.0, INF, -INF])
def test_step_equals_torch_for_any_norm(
    norm_type: float, clip_scope: str, rng: np.random.Generator
) -> None:
    options = StepOptions("AdamW", clip_scope=clip_scope, norm_type=norm_type)
    check_against_torch(options, rng)


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("clip_scope", ["global", "group", "tensor"])
def test_propagate_equals_torch(clip_scope: str, value: float, rng: np.random.Generator) -> None:
    options = StepOptions("SGD", clip_scope=clip_scope, nonfinite="propagate")
    params = [rng.normal(size=shape) for shape in SHAPES]
    grads = random_grads(rng)
    spoiled = rng.normal(size=(3, 4))
    spoiled[0, 0] = value
    grads[1] = spoiled
    groups = two_groups("SGD")
    witness = TorchStep(params, groups, options)
    result = step(params, grads, [{} for _ in params], groups, options)
    assert_close(result.norm, witness.step(grads), torch.float64)
    assert not result.skipped
    for param, tensor in zip(result.params, witness.params, strict=True):
        assert_close(param, tensor, torch.float64)


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_not_written(rule: str, rng: np.random.Generator) -> None:
    params: list[Array] = [rng.normal(size=shape) for shape in SHAPES]
    grads = random_grads(rng)
    for array in [*params, *grads]:
        if array is not None:
            array.setflags(write=False)
    states: list[reference.rules.State] = [{} for _ in params]
    step(params, grads, states, two_groups(rule), StepOptions(rule))
    assert states == [{} for _ in params]
