"""Fused and in-place steps against the NumPy definition of a step, with all of its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.reference.step import Group, StepOptions, StepResult, step
from tests.backends import Backend
from tests.optim.optimizer_runs import plain_class
from tests.optim.parameter_sets import assign, dense_parameters, gradient_sequence, mixed_parameters
from tests.snapshots import bits
from tests.tolerances import assert_close, float64

# Both torch's constructors and the reference's functions use these names. NAdam and ASGD keep numbers in fp32, which
# the reference does not, so they are compared with torch.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.05},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "eps": 1e-6},
    "RMSprop": {"lr": 0.001, "centered": True, "momentum": 0.5, "eps": 1e-3},
    "Adamax": {"lr": 0.01, "weight_decay": 0.01},
    "RAdam": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.05},
    "Adadelta": {"lr": 0.5, "rho": 0.8, "eps": 1e-4},
    "Rprop": {"lr": 0.01, "etas": (0.6, 1.1)},
    "Lion": {"lr": 0.01, "weight_decay": 0.05},
}
RULES = list(HYPER)
ORDERS = ["before_clip", "after_clip"]
L1_MODES = ["subgradient", "proximal"]
SCOPES = ["global", "group", "tensor"]
# In every group each limit and strength has another value, and each is missing once.
GROUP_KEYS: list[dict[str, float | None]] = [
    {"max_norm": 0.5, "clip_value": 0.2, "l1": 0.01, "l2": 0.02},
    {"max_norm": 2.0, "clip_value": None, "l1": 0.0, "l2": 0.1},
    {"max_norm": None, "clip_value": 0.4, "l1": 0.03, "l2": 0.0},
]


def of_groups(hyper: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the numbers of a rule for three groups, each of them raised to another power in every group."""

    def raised(value: Any, power: float) -> Any:
        if isinstance(value, tuple):
            return tuple(raised(each, power) for each in value)
        return value if isinstance(value, bool) else value**power

    return [
        {key: raised(value, power) for key, value in hyper.items()} for power in (1.0, 1.1, 0.9)
    ]


class Descent(torch.optim.Optimizer):
    """A user's own optimizer, which takes the in-place path and equals SGD without options."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"])
        return loss


class BesideReference:
    """An optimizer of three groups, and the reference's version of the same run."""

    def __init__(
        self, rule: str, dtype: torch.dtype, backend: Backend, inplace: bool = False, **ours: Any
    ) -> None:
        """Make three groups of the mixed parameters; the reference has no ``write_grads``."""
        self.dtype = dtype
        self.params: Sequence[Parameter] = mixed_parameters(dtype, backend.device)
        self.states: list[dict[str, Any]] = [{} for _ in self.params]
        self.write_grads = bool(ours.get("write_grads"))
        # The proximal amount is lr * l1, and has to be large enough for zeros to appear in every run.
        stronger = 100.0 if ours.get("l1_mode") == "proximal" else 1.0
        keys_of = [{**keys, "l1": stronger * (keys["l1"] or 0.0)} for keys in GROUP_KEYS]
        thirds = [range(k, len(self.params), 3) for k in range(3)]
        hypers = of_groups({"lr": 0.05} if inplace else HYPER[rule])
        groups = [
            {"params": [self.params[i] for i in indices], **keys, **hyper}
            for indices, keys, hyper in zip(thirds, keys_of, hypers, strict=True)
        ]
        make = Descent if inplace else plain_class(rule)
        self.optimizer = sg.Stabilizer(make(groups, **hypers[0]), **ours)
        self.options = StepOptions(
            rule=rule, **{k: v for k, v in ours.items() if k != "write_grads"}
        )
        self.groups = [
            Group(params=tuple(indices), hyper=hyper, **keys)  # type: ignore[arg-type]
            for indices, keys, hyper in zip(thirds, keys_of, hypers, strict=True)
        ]
        self.exact = [float64(p) for p in self.params]
        self.clipped = self.skipped = 0

    def step(self, grad_scale: float = 1.0, found_inf: float = 0.0) -> StepResult:
        """Step both and compare parameters, norm, counters and written gradients."""
        grads = [None if p.grad is None else float64(p.grad).copy() for p in self.params]
        before = [None if p.grad is None else bits(p.grad) for p in self.params]
        result = step(
            self.exact, grads, self.states, self.groups, self.options, grad_scale, found_inf
        )
        # A GradScaler sets these for one step, then deletes them.
        self.optimizer.grad_scale = torch.tensor(grad_scale)
        self.optimizer.found_inf = torch.tensor(found_inf)
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf
        self.exact, self.states = result.params, result.states
        self.clipped += result.clipped
        self.skipped += result.skipped
        for param, exact in zip(self.params, self.exact, strict=True):
            assert_close(param, exact, self.dtype)
        if np.isfinite(result.norm):
            norm = self.optimizer.grad_norm
            assert norm is not None
            assert_close(norm, result.norm, self.dtype)
        assert self.optimizer.clipped_steps == self.clipped
        assert self.optimizer.skipped_steps == self.skipped
        for param, old, seen in zip(self.params, before, result.grads, strict=True):
            if param.grad is None:
                assert seen is None
            elif self.write_grads and not result.skipped:
                assert_close(param.grad, seen, self.dtype)
            elif self.optimizer.path == "fused":
                assert old is not None and torch.equal(bits(param.grad), old)
        return result

    def assert_states(self) -> None:
        """Compare every entry of every state."""
        for param, want in zip(self.params, self.states, strict=True):
            got = self.optimizer.state.get(param, {})
            assert got.keys() == want.keys()
            for key, value in want.items():
                assert_close(got[key], value, torch.float64 if key == "step" else self.dtype)


@pytest.mark.parametrize("write_grads", [False, True], ids=["read", "write_grads"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("l1_mode", L1_MODES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_all_modes_with_three_groups(
    backend: Backend, rule: str, order: str, l1_mode: str, scope: str, write_grads: bool
) -> None:
    run = BesideReference(
        rule,
        torch.float64,
        backend,
        penalty_order=order,
        l1_mode=l1_mode,
        clip_scope=scope,
        write_grads=write_grads,
    )
    for gradients in gradient_sequence(run.params, 5, seed=3):
        assign(run.params, gradients)
        run.step()
    run.assert_states()
    assert run.clipped > 0
    assert run.optimizer.path == backend.fused_path
    if l1_mode == "proximal":
        zeros = [i for i, p in enumerate(run.params) if bool((p == 0).any())]
        assert zeros and all(run.groups[i % 3].l1 for i in zeros)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_float32(backend: Backend, rule: str, order: str, scope: str) -> None:
    # There is no L1 penalty, whose sign makes rounding visible where a parameter crosses zero.
    run = BesideReference(rule, torch.float32, backend, penalty_order=order, clip_scope=scope)
    run.groups = [
        Group(params=g.params, hyper=g.hyper, max_norm=g.max_norm, clip_value=g.clip_value, l2=g.l2)
        for g in run.groups
    ]
    for group in run.optimizer.param_groups:
        group["l1"] = 0.0
    for gradients in gradient_sequence(run.params, 6, seed=3, decades=4.0):
        assign(run.params, gradients)
        run.step()
    run.assert_states()


@pytest.mark.parametrize("norm_type", [1.0, float("inf"), 3.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_other_norm_types(backend: Backend, scope: str, norm_type: float) -> None:
    run = BesideReference("Adam", torch.float64, backend, clip_scope=scope, norm_type=norm_type)
    for gradients in gradient_sequence(run.params, 5, seed=4):
        assign(run.params, gradients)
        run.step()


@pytest.mark.parametrize("inplace", [False, True], ids=["fused", "in-place"])
@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", ORDERS)
def test_scaling_and_non_finite_policies(
    backend: Backend, order: str, scope: str, nonfinite: str, inplace: bool
) -> None:
    run = BesideReference(
        "SGD" if inplace else "AdamW",
        torch.float64,
        backend,
        inplace=inplace,
        nonfinite=nonfinite,
        clip_scope=scope,
        penalty_order=order,
    )
    for index, gradients in enumerate(gradient_sequence(run.params, 10, seed=5)):
        if index in (0, 4, 7):
            gradient = gradients[6 if gradients[6] is not None else 7]
            assert gradient is not None
            gradient.reshape(-1)[:3] = torch.tensor([float("nan"), float("inf"), 2.0])
            # reshape makes a copy if the layout needs it, so the values are put back then.
            if torch.isfinite(gradient).all():
                gradient[(0,) * gradient.dim()] = float("nan")
        assign(run.params, gradients)
        result = run.step(grad_scale=[1.0, 1024.0][index % 2], found_inf=2.0 * (index == 5))
        assert result.skipped == (index == 5 or (nonfinite == "skip" and index in (0, 4, 7)))
    run.assert_states()
    assert run.optimizer.path.startswith("in-place: " if inplace else backend.fused_path)


@pytest.mark.parametrize("l1_mode", L1_MODES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_in_place_path(backend: Backend, scope: str, order: str, l1_mode: str) -> None:
    run = BesideReference(
        "SGD",
        torch.float64,
        backend,
        inplace=True,
        clip_scope=scope,
        penalty_order=order,
        l1_mode=l1_mode,
    )
    for gradients in gradient_sequence(run.params, 6, seed=6):
        assign(run.params, gradients)
        run.step()
    run.assert_states()
    assert run.optimizer.path.startswith("in-place: ")


def test_write_grads_keeps_the_gradient_object_and_bumps_its_version(backend: Backend) -> None:
    run = BesideReference("SGD", torch.float32, backend, write_grads=True)
    assign(run.params, gradient_sequence(run.params, 1)[0])
    grads = [p.grad for p in run.params]
    versions = [g._version for g in grads if g is not None]
    run.step()
    assert all(p.grad is g for p, g in zip(run.params, grads, strict=True))
    for gradient, version in zip(grads, versions, strict=True):
        assert gradient is not None
        assert gradient._version > version or gradient.numel() == 0


number = st.one_of(st.none(), st.floats(1e-3, 1e3))
strength = st.one_of(st.just(0.0), st.floats(1e-4, 0.5))


@settings(max_examples=60)
@given(
    rule=st.sampled_from(RULES),
    order=st.sampled_from(ORDERS),
    l1_mode=st.sampled_from(L1_MODES),
    scope=st.sampled_from(SCOPES),
    max_norm=number,
    clip_value=number,
    l1=strength,
    l2=strength,
    grad_scale=st.sampled_from([1.0, 65536.0, 0.125]),
    seed=st.integers(0, 1000),
)
def test_any_options(
    backend: Backend,
    rule: str,
    order: str,
    l1_mode: str,
    scope: str,
    max_norm: float | None,
    clip_value: float | None,
    l1: float,
    l2: float,
    grad_scale: float,
    seed: int,
) -> None:
    dtype = torch.float64
    params = dense_parameters(dtype, backend.device, seed)
    modes = {"penalty_order": order, "l1_mode": l1_mode, "clip_scope": scope}
    keys = {"max_norm": max_norm, "clip_value": clip_value, "l1": l1, "l2": l2}
    optimizer = sg.Stabilizer(plain_class(rule)(params, **HYPER[rule]), **modes, **keys)
    options = StepOptions(rule=rule, **modes)
    groups = [Group(params=tuple(range(len(params))), hyper=HYPER[rule], **keys)]  # type: ignore[arg-type]
    exact, states = [float64(p) for p in params], [{} for _ in params]
    for gradients in gradient_sequence(params, 3, seed=seed):
        assign(params, gradients)
        optimizer.grad_scale = torch.tensor(grad_scale)
        grads = [None if g is None else float64(g) for g in gradients]
        result = step(exact, grads, states, groups, options, grad_scale)
        exact, states = result.params, result.states
        optimizer.step()
        assert_close(optimizer.grad_norm, result.norm, dtype)
    for param, want in zip(params, exact, strict=True):
        assert_close(param, want, dtype)
    assert optimizer.path == backend.fused_path
