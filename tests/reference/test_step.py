from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from steadygrad import reference
from steadygrad.reference.step import Group, StepOptions, StepResult, step
from tests.tolerances import assert_close

Array = NDArray[np.float64]
Grads = list[Array | None]

INF = math.inf
NONFINITE = [math.nan, INF, -INF]
POLICIES = ["skip", "zero", "raise", "propagate"]


def sgd_step(
    params: Sequence[Array], grads: Sequence[Array | None], modes: dict[str, Any], **group: Any
) -> StepResult:
    """Take a first step of plain SGD with lr 0.5 and all parameters in one group."""
    groups = [Group(range(len(params)), {"lr": 0.5}, **group)]
    return step(params, grads, [{} for _ in params], groups, StepOptions("SGD", **modes))


def some(array: Array | None) -> Array:
    assert array is not None
    return array


def test_penalty_before_clip_equals_autograd_of_the_penalised_loss(
    rng: np.random.Generator,
) -> None:
    l1, l2 = 0.3, 0.7
    inputs = torch.tensor(rng.normal(size=(7, 4)))
    weight = torch.tensor(rng.normal(size=(3, 4)), requires_grad=True)
    bias = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    params = [weight, bias]
    loss = torch.tanh(inputs @ weight.T + bias).square().sum()
    penalty = sum(l1 * p.abs().sum() + l2 / 2 * p.square().sum() for p in params)
    grads = [g.numpy() for g in torch.autograd.grad(loss, params, retain_graph=True)]
    expected = torch.autograd.grad(loss + penalty, params)
    result = sgd_step([p.detach().numpy() for p in params], grads, {}, l1=l1, l2=l2)
    for actual, grad in zip(result.grads, expected, strict=True):
        assert_close(actual, grad, torch.float64)
    assert_close(result.norm, torch.nn.utils.get_total_norm(expected), torch.float64)


def test_penalty_after_clip_is_not_clipped() -> None:
    result = sgd_step(
        [np.array([2.0, 0.0])],
        [np.array([30.0, -40.0])],
        {"penalty_order": "after_clip"},
        max_norm=5.0,
        l1=10.0,
        l2=100.0,
    )
    assert result.norm == 50.0
    np.testing.assert_allclose(some(result.grads[0]), [3.0 + 10.0 + 200.0, -4.0], rtol=1e-6)


@pytest.mark.parametrize("rule", reference.rules.RULES)
def test_proximal_mode_gives_exact_zeros(rule: str, rng: np.random.Generator) -> None:
    params = [np.array([0.3, -0.3, 0.0, 5.0, -5.0])]
    grads: Grads = [1e-3 * rng.normal(size=5)]
    groups = [Group([0], {"lr": 0.01}, l1=100.0)]
    result = step(params, grads, [{}], groups, StepOptions(rule, l1_mode="proximal"))
    assert result.params[0][:3].tolist() == [0.0, 0.0, 0.0]
    assert (np.abs(result.params[0][3:]) > 3).all()
    np.testing.assert_array_equal(some(result.grads[0]), some(grads[0]))
    assert result.norm == reference.norm.tensor_norm(some(grads[0]))


def test_proximal_mode_keeps_l2_in_the_gradient() -> None:
    modes = {"l1_mode": "proximal"}
    result = sgd_step([np.array([2.0])], [np.array([1.0])], modes, l1=0.2, l2=3.0)
    assert some(result.grads[0]).tolist() == [1.0 + 3.0 * 2.0]
    # 2 - 0.5 * 7 = -1.5, then 0.5 * 0.2 nearer to zero
    assert_close(result.params[0], [-1.4], torch.float64)


@pytest.mark.parametrize(
    ("clip_scope", "scope_norms"),
    [("global", [13.0, 13.0, 13.0]), ("group", [5.0, 5.0, 12.0]), ("tensor", [3.0, 4.0, 12.0])],
)
def test_limit_of_a_group_applies_to_the_norm_of_its_scope(
    clip_scope: str, scope_norms: list[float]
) -> None:
    grads: Grads = [np.array([3.0]), np.array([4.0]), np.array([12.0]), None]
    params = [np.zeros(1) for _ in grads]
    groups = [Group([0, 1], {"lr": 1.0}, max_norm=1.0), Group([2, 3], {"lr": 1.0}, max_norm=6.0)]
    options = StepOptions("SGD", clip_scope=clip_scope)
    result = step(params, grads, [{} for _ in params], groups, options)
    assert result.norm == 13.0
    assert result.clipped
    limits = [1.0, 1.0, 6.0]
    for param, grad, limit, scope_norm in zip(
        result.params, grads[:3], limits, scope_norms, strict=False
    ):
        assert_close(param, -some(grad) * min(1, limit / (scope_norm + 1e-6)), torch.float64)


def test_clipped_says_that_a_coefficient_was_below_one() -> None:
    params, grads = [np.zeros(1), np.zeros(1)], [np.array([3.0]), np.array([4.0])]
    expected = {None: False, 5.1: False, 5.0: True, INF: False, 0.0: True}
    for max_norm, clipped in expected.items():
        assert sgd_step(params, grads, {}, max_norm=max_norm).clipped is clipped
    assert not sgd_step(params, grads, {}, clip_value=0.1).clipped
    # A group without gradients clips nothing.
    groups = [Group([0], {"lr": 1.0}, max_norm=0.0), Group([1], {"lr": 1.0}, max_norm=9.0)]
    assert not step(params, [None, grads[1]], [{}, {}], groups, StepOptions("SGD")).clipped


def test_clip_value_comes_after_the_norm_clip() -> None:
    grads: Grads = [np.array([30.0, -40.0])]
    result = sgd_step([np.zeros(2)], grads, {}, max_norm=5.0, clip_value=3.5)
    np.testing.assert_allclose(some(result.grads[0]), [3.0, -3.5], rtol=1e-6)


@pytest.mark.parametrize("clip_scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("value", NONFINITE)
def test_skip_returns_everything_as_it_came_in(value: float, clip_scope: str) -> None:
    params = [np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0])]
    grads: Grads = [np.array([1.0, value]), np.array([1.0]), None]
    states: list[reference.rules.State] = [{"step": np.array(3.0)}, {}, {}]
    groups = [Group([0], {"lr": 1.0}, max_norm=1.0, l1=1.0), Group([1, 2], {"lr": 1.0})]
    options = StepOptions("Adam", clip_scope=clip_scope)
    result = step(params, grads, states, groups, options)
    assert result.skipped and not result.clipped
    assert not math.isfinite(result.norm)
    returned: list[Any] = [*result.params, *result.grads, *result.states]
    assert all(a is b for a, b in zip(returned, [*params, *grads, *states], strict=True))
    assert states[1:] == [{}, {}]


@pytest.mark.parametrize("value", NONFINITE)
def test_zero_counts_nonfinite_elements_as_zero(value: float) -> None:
    grads: Grads = [np.array([3.0, value]), np.array([value, 4.0])]
    params = [np.ones(2), np.ones(2)]
    result = sgd_step(params, grads, {"nonfinite": "zero"}, max_norm=1.0)
    expected = sgd_step(params, [np.array([3.0, 0.0]), np.array([0.0, 4.0])], {}, max_norm=1.0)
    assert result.norm == expected.norm == 5.0
    assert result.clipped and not result.skipped
    np.testing.assert_array_equal(result.params, expected.params)
    np.testing.assert_array_equal(np.isnan(result.params), False)


@pytest.mark.parametrize("value", NONFINITE)
def test_raise(value: float) -> None:
    grads: Grads = [np.array([3.0]), np.array([value])]
    with pytest.raises(RuntimeError, match="step: gradients must be finite, got a total norm of"):
        sgd_step([np.ones(1), np.ones(1)], grads, {"nonfinite": "raise"})


@pytest.mark.parametrize(
    ("value", "norm", "expected"),
    [
        (INF, INF, [0.0, math.nan]),
        (-INF, INF, [0.0, math.nan]),
        (math.nan, math.nan, [math.nan] * 2),
    ],
)
def test_propagate(value: float, norm: float, expected: list[float]) -> None:
    modes = {"nonfinite": "propagate"}
    result = sgd_step([np.ones(2)], [np.array([3.0, value])], modes, max_norm=1.0)
    np.testing.assert_array_equal(some(result.grads[0]), expected)
    np.testing.assert_equal(result.norm, norm)
    assert result.clipped is (norm == INF)


@pytest.mark.parametrize("policy", POLICIES)
def test_finite_gradients_are_the_same_under_every_policy(
    policy: str, rng: np.random.Generator
) -> None:
    params, grads = [rng.normal(size=9)], [rng.normal(size=9)]
    result = sgd_step(params, grads, {"nonfinite": policy}, max_norm=1.0)
    expected = sgd_step(params, grads, {}, max_norm=1.0)
    for actual, param in zip(result.params, expected.params, strict=True):
        np.testing.assert_array_equal(actual, param)


@pytest.mark.parametrize(
    ("policy", "value"), list(itertools.product(POLICIES, [1.0, math.nan, INF]))
)
def test_found_inf_skips_under_every_policy(policy: str, value: float) -> None:
    params, grads, states = [np.ones(1)], [np.array([value])], [{"step": np.array(7.0)}]
    groups = [Group([0], {"lr": 1.0}, max_norm=0.5)]
    options = StepOptions("Adam", nonfinite=policy)
    result = step(params, grads, states, groups, options, grad_scale=2.0, found_inf=2.0)
    assert result.skipped and not result.clipped
    assert result.params[0] is params[0]
    assert result.grads[0] is grads[0]
    assert result.states[0] is states[0]
    np.testing.assert_equal(result.norm, value / 2)


@pytest.mark.parametrize("magnitude", [3e19, 1e200, 1e307])
@pytest.mark.parametrize("clip_scope", ["global", "group", "tensor"])
def test_huge_gradients_are_clipped_right(magnitude: float, clip_scope: str) -> None:
    grads: Grads = [np.array([3.0, -4.0]) * magnitude]
    result = sgd_step([np.ones(2)], grads, {"clip_scope": clip_scope}, max_norm=1.0)
    np.testing.assert_allclose(result.norm, 5 * magnitude, rtol=1e-15)
    np.testing.assert_allclose(some(result.grads[0]), [0.6, -0.8], rtol=1e-14)
    assert result.clipped and not result.skipped


def test_finite_gradients_whose_norm_is_beyond_float64_are_not_skipped() -> None:
    result = sgd_step([np.ones(2)], [np.full(2, 1.7e308)], {})
    assert result.norm == INF
    assert not result.skipped


def test_norm_is_taken_after_unscaling_and_before_clipping() -> None:
    groups = [Group([0], {"lr": 1.0}, max_norm=1.0, l2=2.0)]
    params, grads = [np.array([0.5, 0.0])], [np.array([8.0, 16.0])]
    result = step(params, grads, [{}], groups, StepOptions("SGD"), grad_scale=4.0)
    assert result.norm == 5.0


def test_count_of_nonzeros_as_norm() -> None:
    grads: Grads = [np.array([0.0, 7.0, 7.0]), np.array([7.0, 0.0])]
    assert sgd_step([np.ones(3), np.ones(2)], grads, {"norm_type": 0.0}).norm == 3.0


def test_parameters_without_gradient_take_no_part() -> None:
    params = [np.array([1.0]), np.array([2.0])]
    states: list[reference.rules.State] = [{}, {"step": np.array(4.0)}]
    hyper = {"lr": 0.1, "weight_decay": 0.5}
    groups = [Group([0, 1], hyper, max_norm=1.0, l1=1.0, l2=1.0)]
    options = StepOptions("AdamW", l1_mode="proximal")
    result = step(params, [np.array([1.0]), None], states, groups, options)
    assert result.params[1] is params[1]
    assert result.states[1] is states[1]
    assert result.grads[1] is None
    assert result.norm == 2.0
    untouched = step(params, [None, None], states, groups, options)
    assert untouched.norm == 0.0
    assert not untouched.skipped and not untouched.clipped
    assert all(a is b for a, b in zip(untouched.params, params, strict=True))


def test_parameters_outside_all_groups_take_no_part() -> None:
    params, grads = [np.array([1.0]), np.array([2.0])], [np.array([1.0]), np.array([math.nan])]
    result = step(params, grads, [{}, {}], [Group([0], {"lr": 1.0})], StepOptions("SGD"))
    assert result.params[0].tolist() == [0.0]
    assert result.params[1] is params[1]
    assert result.norm == 1.0 and not result.skipped


@pytest.mark.parametrize(
    "modes",
    [
        {"rule": "Muon"},
        {"penalty_order": "before"},
        {"l1_mode": "prox"},
        {"clip_scope": "layer"},
        {"nonfinite": "ignore"},
        {"norm_type": math.nan},
    ],
)
def test_unknown_modes_are_refused(modes: dict[str, Any]) -> None:
    (name,) = modes
    with pytest.raises(ValueError, match=f"StepOptions: {name} must be .*, got "):
        StepOptions(**{"rule": "SGD", **modes})


@pytest.mark.parametrize("name", ["max_norm", "clip_value", "l1", "l2"])
@pytest.mark.parametrize("value", [-1.0, math.nan, -INF])
def test_negative_limits_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Group: {name} must be non-negative, got {value}"):
        Group([0], **{name: value})  # type: ignore[arg-type]
