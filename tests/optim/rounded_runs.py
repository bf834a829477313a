"""An optimizer of half-precision parameters, stepped beside the definition of its rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from steadygrad.reference import rounding
from tests.optim.optimizer_runs import make_ours
from tests.snapshots import assert_same_tree, bits
from tests.tolerances import float64

HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.05},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "eps": 1e-6},
    "RMSprop": {"lr": 0.001, "centered": True, "momentum": 0.5, "eps": 1e-3},
    "Adamax": {"lr": 0.01, "weight_decay": 0.01},
    "NAdam": {"lr": 0.01, "weight_decay": 0.01, "momentum_decay": 0.1},
    "RAdam": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.05},
    "Adadelta": {"lr": 0.5, "rho": 0.8, "eps": 1e-4},
    "ASGD": {"lr": 0.05, "lambd": 0.01, "t0": 2.0},
    "Rprop": {"lr": 0.01, "etas": (0.6, 1.1)},
    "Lion": {"lr": 0.01, "weight_decay": 0.05},
}
HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
EXTRAS = {"kahan": "kahan_compensation", "master": "master_param"}


def with_grad_dtype(params: Sequence[Tensor], dtype: torch.dtype) -> list[Parameter]:
    """Return parameters that take gradients of another dtype."""
    made = [Parameter(p.detach()) for p in params]
    for param in made:
        param.grad_dtype = dtype
    return made


class BesideTwin:
    """Ours, and an fp32 twin whose parameters are set before each step to the values that ours represent.

    State and gradients are fp32 in both, so an update has the same bits in both. What ours stores of it has to be what
    :mod:`steadygrad.reference.rounding` defines. The gradients may have any size, and their dtype is fp32.
    """

    def __init__(
        self, rule: str, how: str, params: Sequence[Parameter], wrap: bool = True, **ours: Any
    ) -> None:
        self.how = how
        self.seed = ours.pop("rounding_seed", 3)
        self.dtype = HALVES[params[0].dtype]
        self.params = list(params)
        # `to` keeps the strides, so both visit their elements in the same order.
        self.twins = [Parameter(p.detach().float()) for p in params]
        options = HYPER[rule]
        self.ours = make_ours(
            rule,
            self.params,
            options,
            wrap,
            rounding=how,
            rounding_seed=self.seed,
            state_dtype=torch.float32,
            **ours,
        )
        self.twin = make_ours(rule, self.twins, options, wrap, **ours)
        self.steps = 0

    def extra(self, index: int) -> Tensor | None:
        """Return what the state keeps beside a parameter, or None."""
        name = EXTRAS.get(self.how)
        return None if name is None else self.ours.state[self.params[index]].get(name)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Step both with fp32 gradients; compare parameters, what is kept beside them, and state."""
        for i, twin in enumerate(self.twins):
            twin.data.copy_(self._value(i))
        for params in (self.params, self.twins):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
        self.ours.step()
        self.twin.step()
        assert self.ours.path == "fused"
        self._compare(gradients)
        self.steps += 1

    def _value(self, index: int) -> Tensor:
        param, extra = self.params[index], self.extra(index)
        if extra is None:
            return param.detach().float()
        joined = {
            "kahan": rounding.kahan_value,
            "master": rounding.master_value,
        }[self.how](float64(param), float64(extra), self.dtype)
        return torch.from_numpy(joined).float().to(param.device)

    def _compare(self, gradients: Sequence[Tensor | None]) -> None:
        for i, (param, twin, gradient) in enumerate(
            zip(self.params, self.twins, gradients, strict=True)
        ):
            if gradient is None:
                continue
            value = float64(twin)
            extra = None
            if self.how == "stochastic":
                words = rounding.random_words(self.seed, self.steps, i, value.size)
                want = rounding.round_stochastic(value, self.dtype, words.reshape(value.shape))
            elif self.how == "kahan":
                want, extra = rounding.kahan_split(value, self.dtype)
            else:
                want = rounding.round_nearest(value, self.dtype)
                extra = value
            same(param, want, f"step {self.steps}, parameter {i}")
            if extra is not None:
                got = self.extra(i)
                assert got is not None
                assert got.dtype == (torch.float32 if self.how == "master" else param.dtype)
                same(got, extra, f"step {self.steps}, beside parameter {i}")
            for name, state in self.twin.state[twin].items():
                mine = self.ours.state[param][name]
                assert mine.dtype == torch.float32
                assert torch.equal(bits(mine), bits(state)), f"{name} of parameter {i}"


def same(got: Tensor, want: Any, what: str) -> None:
    """Compare a half-precision or fp32 tensor with a float64 array, bit for bit; NaN equals NaN."""
    wanted = torch.as_tensor(want).to(got.dtype)
    assert got.shape == wanted.shape, what
    different = bits(got) != bits(wanted)
    both_nan = (got.detach().isnan().cpu() & wanted.isnan()).reshape(-1)
    wrong = different & ~both_nan
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ"


def resumed(optimizer: Any, rule: str, params: Sequence[Tensor], wrap: bool, **ours: Any) -> Any:
    """Return a new optimizer on copies of the parameters, with the old one's checkpoint loaded."""
    copies = [Parameter(p.detach().clone()) for p in params]
    for param, copied in zip(params, copies, strict=True):
        copied.grad_dtype = param.grad_dtype  # type: ignore[attr-defined]
    made = make_ours(rule, copies, HYPER[rule], wrap, **ours)
    made.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return made


def make(rule: str, params: Sequence[Parameter], wrap: bool = True, **ours: Any) -> Any:
    if rule == "plain":
        return make_ours("SGD", params, {"lr": 0.05}, wrap, **ours)
    return make_ours(rule, params, HYPER[rule], wrap, **ours)


def give(params: Sequence[Parameter], seed: int, bad: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)
    if bad is not None:
        grad = params[-1].grad
        assert grad is not None
        grad.view(-1)[-1] = bad


def step(optimizer: Any, params: Sequence[Parameter], *seeds: int) -> None:
    for seed in seeds:
        give(params, seed)
        optimizer.step()
        assert optimizer.path == "fused"


def assert_same_run(a: Any, b: Any) -> None:
    """Compare parameters, state and counters of two optimizers, bit for bit."""
    for one, other in zip(params_of(a), params_of(b), strict=True):
        assert torch.equal(bits(one), bits(other))
    assert_same_tree(a.state_dict(), b.state_dict())


def params_of(optimizer: Any) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
