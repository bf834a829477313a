"""Half-precision parameters against the definition of their roundings, bit for bit, over all backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.reference import rounding
from tests.backends import Backend
from tests.optim.optimizer_runs import plain_class
from tests.optim.parameter_sets import gradient_sequence, like_layout, mixed_parameters
from tests.optim.rounded_runs import HALVES, HYPER, BesideTwin, same, with_grad_dtype
from tests.reference.test_rounding import any_floats, ordinary_floats
from tests.snapshots import bits
from tests.tolerances import float64

RULES = list(HYPER)
ROUNDINGS = ["stochastic", "kahan", "master"]
halves = pytest.mark.parametrize("dtype", list(HALVES), ids=HALVES.get)


def some_parameters(dtype: torch.dtype, backend: Backend) -> list[Parameter]:
    """Return contiguous, sliced and misaligned parameters, of sizes at the edges of vectors and chunks."""
    generator = torch.Generator().manual_seed(2)
    tensors = [
        torch.randn(size, generator=generator).to(dtype).to(backend.device)
        for size in (1, 31, 130, 8192, 8197)
    ]
    strided = torch.randn(40, 9, generator=generator).to(dtype).to(backend.device)[:, 2:7]
    shifted = torch.randn(403, generator=generator).to(dtype).to(backend.device)[1:]
    return with_grad_dtype([*tensors, strided, shifted], torch.float32)


def gradients_for(params: list[Parameter], seed: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [
        None
        if (seed + i) % 5 == 4
        else torch.randn(p.shape, generator=generator).to(p.device) * 10.0 ** (seed % 3 - 1)
        for i, p in enumerate(params)
    ]


@halves
@pytest.mark.parametrize("how", ROUNDINGS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_rounds_as_defined(
    backend: Backend, rule: str, how: str, dtype: torch.dtype
) -> None:
    run = BesideTwin(rule, how, some_parameters(dtype, backend), max_norm=1.0)
    for seed in range(4):
        run.step(gradients_for(run.params, seed))
    if how != "stochastic":
        extras = [run.extra(i) for i in range(len(run.params))]
        assert all(extra is not None and bool((extra != 0).any()) for extra in extras)


@halves
@pytest.mark.parametrize("how", ["kahan", "master"])
def test_every_layout(backend: Backend, how: str, dtype: torch.dtype) -> None:
    params = with_grad_dtype(mixed_parameters(dtype, backend.device), torch.float32)
    run = BesideTwin("AdamW", how, params, wrap=False, max_norm=1.0, clip_value=0.05)
    for gradients in gradient_sequence(run.twins, 4, seed=1):
        run.step(gradients)


@halves
@pytest.mark.parametrize("how", ROUNDINGS)
def test_the_proximal_step_acts_on_the_value(
    backend: Backend, how: str, dtype: torch.dtype
) -> None:
    run = BesideTwin("SGD", how, some_parameters(dtype, backend), l1=2.0, l1_mode="proximal")
    for seed in range(3):
        run.step(gradients_for(run.params, seed))
    assert any(bool((p == 0).any()) for p in run.params)


@halves
@pytest.mark.parametrize("kind", ["any", "ordinary"])
@pytest.mark.parametrize("how", ROUNDINGS)
def test_every_number(backend: Backend, how: str, kind: str, dtype: torch.dtype) -> None:
    # A step from 0 with learning rate 1 puts any number into the parameter.
    name = HALVES[dtype]
    count = 20000 if backend.name == "cpu" else 9000
    values = any_floats(count) if kind == "any" else ordinary_floats(name, count)
    (param,) = with_grad_dtype(
        [torch.zeros(count, dtype=dtype, device=backend.device)], torch.float32
    )
    param.grad = torch.from_numpy(-values).to(backend.device)
    optimizer = sg.optim.SGD(
        [param], lr=1.0, rounding=how, rounding_seed=2**63 + 5, nonfinite="propagate"
    )
    optimizer.step()
    # Both 0 - (-0) and 0 - 0 are 0.
    values = values + np.float32(0)
    want = rounding.round_nearest(values, name)
    if how == "stochastic":
        words = rounding.random_words(2**63 + 5, 0, 0, count)
        want = rounding.round_stochastic(values, name, words)
        assert bool((want != rounding.round_nearest(values, name)).any())
    same(param, want, "parameter")
    if how == "kahan":
        same(
            optimizer.state[param]["kahan_compensation"], rounding.kahan_split(values, name)[1], how
        )
    if how == "master":
        same(optimizer.state[param]["master_param"], values, how)


@halves
def test_stochastic_rounding_is_unbiased(backend: Backend, dtype: torch.dtype) -> None:
    # Steps are 1/64 of the spacing of the parameter's dtype, so rounding to nearest would never move it.
    size, steps = 4096, 64
    start = 1.0
    spacing = float(rounding.FORMATS[HALVES[dtype]].spacing(start))
    param = Parameter(torch.full((size,), start, dtype=dtype, device=backend.device))
    param.grad_dtype = torch.float32
    optimizer = sg.optim.SGD([param], lr=1.0, rounding="stochastic", rounding_seed=1)
    for _ in range(steps):
        param.grad = torch.full((size,), -spacing / 64, device=backend.device)
        optimizer.step()
    moved = (float64(param) - start) / spacing
    # This is a sum of 64 draws with probability 1/64: mean 1, variance 63/64.
    assert abs(moved.mean() - 1) < 5 / size**0.5
    assert abs(moved.var() - 63 / 64) < 0.15


def test_half_gradients_of_fp32_parameters_and_the_reverse(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    for rule in RULES:
        for dtype in HALVES:
            start = torch.randn(9001, generator=generator).to(dtype).float()
            narrow = torch.randn(9001, generator=generator).to(dtype)
            (mixed,) = with_grad_dtype([start.clone().to(backend.device)], dtype)
            plain = Parameter(start.clone().to(backend.device))
            mixed.grad, plain.grad = narrow.to(backend.device), narrow.float().to(backend.device)
            optimizers = [
                sg.Stabilizer(plain_class(rule)([p], **HYPER[rule]), max_norm=0.5, l2=0.1)
                for p in (mixed, plain)
            ]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.step()
                assert optimizer.path == "fused"
            assert torch.equal(bits(mixed), bits(plain)), (rule, dtype)


@halves
def test_penalties_see_the_parameter_as_it_is_stored(backend: Backend, dtype: torch.dtype) -> None:
    (param,) = with_grad_dtype(
        [torch.full((200,), 1.0, dtype=dtype, device=backend.device)], torch.float32
    )
    optimizer = sg.optim.SGD([param], lr=2.0**-12, rounding="master", l2=1.0, max_norm=1e9)
    for _ in range(2):
        param.grad = torch.zeros(200, device=backend.device)
        optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(200**0.5, rel=1e-6)
    # The penalty of 1 acts twice, although the value is a little below 1 in the second step.
    same(optimizer.state[param]["master_param"], np.full(200, 1 - 2 * 2.0**-12), "master")


@halves
@pytest.mark.parametrize("how", ROUNDINGS)
def test_any_layout_of_gradients(backend: Backend, how: str, dtype: torch.dtype) -> None:
    # The gradients have the parameter's own dtype and may be strided; the twin gets the same numbers.
    for layout in range(4):
        generator = torch.Generator().manual_seed(layout)
        params = [
            Parameter(torch.randn(40, 33, generator=generator).to(dtype).to(backend.device))
            for _ in range(2)
        ]
        optimizers = [
            sg.optim.AdamW([p], lr=0.01, rounding=how, state_dtype=torch.float32) for p in params
        ]
        params[1].data.copy_(params[0])
        grad = torch.randn(40, 33, generator=generator).to(dtype).to(backend.device)
        params[0].grad = like_layout(grad, layout)
        params[1].grad = grad
        for optimizer in optimizers:
            optimizer.step()
        if how == "stochastic":
            # The order of visits may differ, and with it the random bits of each element.
            spacing = rounding.FORMATS[HALVES[dtype]].spacing(float64(params[1]))
            assert (np.abs(float64(params[0]) - float64(params[1])) <= spacing).all()
        else:
            assert torch.equal(bits(params[0]), bits(params[1]))
