"""Impossible arguments of policies, and policies where none can be: the message names what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.policies import KernelPolicy
from steadygrad.reference import policies as reference
from tests.backends import Backend

PERCENTILE, ZSCORE, RELATIVE = sg.ClipPercentile, sg.ClipZScore, sg.ClipRelative
VALUES: list[tuple[Callable[..., Any], str, list[Any]]] = [
    (sg.ClipNorm, "max_norm", [-1, math.nan]),
    (sg.Damp, "max_norm", [-1.0, math.nan, math.inf]),
    (lambda **given: sg.Damp(1.0, **given), "power", [0, -0.5, 1.01, math.nan]),
    (PERCENTILE, "percentile", [-1, 100.5, math.nan, math.inf]),
    (PERCENTILE, "window", [0, -3]),
    (ZSCORE, "z_threshold", [0, -2.5, math.nan, math.inf]),
    (ZSCORE, "alpha", [-0.1, 1.0, 1.5, math.nan]),
    (ZSCORE, "warmup", [0, -1]),
    (ZSCORE, "max_norm", [-1, math.nan]),
    (ZSCORE, "clip_factor", [0, -1, math.inf]),
    (RELATIVE, "relative", [0, -1, math.nan]),
    (RELATIVE, "beta", [-0.1, 1, math.nan]),
    (RELATIVE, "warmup", [0]),
    (RELATIVE, "max_norm", [-1]),
    (sg.SkipSpikes, "sigma", [0, -6, math.nan, math.inf]),
    (sg.SkipSpikes, "window", [1, 0, -128]),
]
ids = [f"{index}-{name}" for index, (_, name, _) in enumerate(VALUES)]
COUNTS = {"window", "warmup"}


@pytest.mark.parametrize(("make", "name", "values"), VALUES, ids=ids)
def test_values_out_of_range(make: Callable[..., Any], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"\w+: {name}: expected .*got {value!r}"):
            make(**{name: value})


def test_a_number_beyond_those_of_float64() -> None:
    with pytest.raises(
        ValueError, match=r"clipping: expected a finite number >= 0, got a larger int than float64"
    ):
        sg.ClipAdaptive(clipping=10**400)
    optimizer = made(clip=sg.ClipAdaptive())
    optimizer.param_groups[0]["clipping"] = 10**5000
    with pytest.raises(
        ValueError, match=r"step: param_groups\[0\]: clipping: expected .*got a larger int"
    ):
        optimizer.step()


@pytest.mark.parametrize(("make", "name", "values"), VALUES, ids=ids)
def test_values_of_another_type(make: Callable[..., Any], name: str, values: list[Any]) -> None:
    for value in ["much", [1.0], *([2.5, True, None] if name in COUNTS else [])]:
        with pytest.raises(TypeError, match=rf"\w+: {name}: expected "):
            make(**{name: value})


def made(**ours: Any) -> Any:
    return sg.optim.SGD([Parameter(torch.zeros(1))], lr=0.1, **ours)


def test_no_policy_where_one_is_expected() -> None:
    for clip in (1.0, "ClipNorm", sg.ClipNorm, sg.SkipSpikes(), KernelPolicy()):
        with pytest.raises(TypeError, match=r"Stabilizer: clip: expected a clip policy such as"):
            made(clip=clip)
    for skip in (6, True, sg.SkipSpikes, sg.ClipZScore()):
        with pytest.raises(TypeError, match=r"Stabilizer: skip: expected a SkipSpikes or None"):
            made(skip=skip)


def test_every_clip_policy_is_one() -> None:
    policies = (
        sg.ClipNorm(1.0),
        sg.ClipPercentile(),
        sg.ClipZScore(),
        sg.ClipRelative(),
        sg.ClipAdaptive(),
        sg.Damp(1.0),
    )
    for policy in policies:
        assert isinstance(policy, sg.ClipPolicy)
        with pytest.raises(NotImplementedError, match=rf"{type(policy).__name__}\.limits: "):
            policy.limits(torch.ones(1))
    assert not isinstance(sg.SkipSpikes(), sg.ClipPolicy)


def test_two_constant_limits_at_once() -> None:
    expected = (
        r"clip: expected a policy that finds a limit, since max_norm=2\.0 is given, got ClipNorm"
    )
    with pytest.raises(ValueError, match=rf"Stabilizer: {expected}"):
        made(max_norm=2.0, clip=sg.ClipNorm(1.0))
    with pytest.raises(ValueError, match=expected):
        sg.Stabilizer(
            torch.optim.SGD([Parameter(torch.zeros(1))]), max_norm=2.0, clip=sg.ClipNorm(1.0)
        )


@pytest.mark.parametrize(
    "clip",
    [sg.ClipPercentile(50), sg.ClipZScore(), sg.ClipRelative(), sg.ClipAdaptive(), sg.Damp(1.0)],
    ids=lambda clip: type(clip).__name__,
)
def test_a_limit_beside_a_policy_is_its_cap(clip: Any) -> None:
    given, later = (Parameter(torch.ones(3)) for _ in range(2))
    optimizers = [sg.optim.SGD([given], lr=0.1, clip=clip, max_norm=0.5)]
    optimizers.append(sg.optim.SGD([later], lr=0.1, clip=clip))
    optimizers[1].max_norm = 0.5
    for scale in (3.0, 1.0, 5.0):
        for parameter, optimizer in zip((given, later), optimizers, strict=True):
            before = parameter.detach().clone()
            parameter.grad = torch.full((3,), scale)
            optimizer.step()
            assert float((before - parameter.detach()).norm()) <= 0.1 * 0.5 + 1e-6
    assert torch.equal(given, later)
    assert optimizers[0].clipped_steps == 3


def test_the_scope_is_the_policys_where_none_is_given() -> None:
    assert made()._options.scope == made(clip=sg.ClipZScore())._options.scope == "global"
    assert made(clip=sg.ClipRelative())._options.scope == "tensor"
    assert made(clip=sg.ClipRelative(), clip_scope="global")._options.scope == "global"
    with pytest.raises(ValueError, match=r"clip_scope: expected one of"):
        made(clip=sg.ClipRelative(), clip_scope="layer")


def test_policies_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        sg.ClipNorm(1.0).max_norm = 2.0  # type: ignore[misc]
    assert sg.ClipZScore() == sg.ClipZScore() != sg.ClipZScore(alpha=0.5)


@pytest.mark.parametrize(
    "state",
    [
        "ClipPercentile",
        ["ClipPercentile", 3, 7.0, 1.0, 1.0],
        ["ClipPercentile", 9, 0.0, *[1.0] * 8],
        ["ClipZScore", 3, 1.0, 1.0, 0.0],
        [],
    ],
    ids=str,
)
def test_state_that_does_not_fit_is_no_state(backend: Backend, state: Any) -> None:
    optimizer = sg.optim.SGD(
        [Parameter(torch.zeros(1, device=backend.device))], lr=1.0, clip=sg.ClipPercentile(window=4)
    )
    saved = optimizer.state_dict()
    saved["param_groups"][0]["clip_state"] = state
    optimizer.load_state_dict(saved)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.full_like(param, 3.0)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["clip_state"] == [
        "ClipPercentile",
        2,
        1.0,
        3.0,
    ]


def test_state_with_fewer_numbers_than_it_says_is_refused(backend: Backend) -> None:
    optimizer = sg.optim.SGD(
        [Parameter(torch.zeros(1, device=backend.device))], lr=1.0, clip=sg.ClipPercentile(window=4)
    )
    saved = optimizer.state_dict()
    saved["param_groups"][0]["clip_state"] = ["ClipPercentile", 2, 0.0]
    with pytest.raises(ValueError, match=r"clip_state: expected \[name, n, n numbers"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "make",
    [
        lambda: reference.ClipPercentile(101),
        lambda: reference.ClipPercentile(window=0),
        lambda: reference.ClipZScore(z_threshold=0),
        lambda: reference.ClipZScore(alpha=1),
        lambda: reference.ClipRelative(relative=0),
        lambda: reference.ClipRelative(warmup=0),
        lambda: reference.Damp(1.0, 0.0),
        lambda: reference.SkipSpikes(sigma=0),
        lambda: reference.SkipSpikes(window=1),
    ],
)
def test_the_references_refuse_too(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.kernels
@pytest.mark.parametrize("replace", ["param.data", "storage", "state.data", "grad.data"])
def test_a_policy_that_replaces_memory_is_refused(backend: Backend, replace: str) -> None:
    param = Parameter(torch.ones(5, device=backend.device))
    param.grad = torch.full((5,), 3.0, device=backend.device)

    class Replaces(sg.ClipPolicy):
        active = False

        def limits(self, norms: torch.Tensor) -> float:
            if not self.active:
                return 1.0
            tensor = {"param.data": param, "grad.data": param.grad}.get(replace)
            if replace == "storage":
                param.untyped_storage().resize_(0)
            elif tensor is None:
                optimizer.state[param]["exp_avg"].data = torch.zeros(5, device=backend.device)
            else:
                tensor.data = tensor.detach().clone()
            return 1.0

    policy = Replaces()
    optimizer = sg.optim.AdamW([param], lr=0.5, clip=policy)
    optimizer.step()
    before, count = param.detach().clone(), float(optimizer.state[param]["step"])
    policy.active = True
    with pytest.raises(RuntimeError, match=r"step: parameters.*replaced"):
        optimizer.step()
    assert float(optimizer.state[param]["step"]) == count
    if replace != "storage":
        assert torch.equal(param, before)
        policy.active = False
        optimizer.step()
        assert not torch.equal(param, before)
