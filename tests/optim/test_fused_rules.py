"""Each fused rule, over all options of torch's constructor, against torch's clip and optimizer."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import steadygrad as sg
from tests.backends import Backend
from tests.covering import covering
from tests.optim.optimizer_runs import (
    assert_same_params,
    assert_same_state,
    make_ours,
    make_torch,
    plain_class,
    run_beside_torch,
    shared_gradients,
)
from tests.optim.parameter_sets import assign, assign_copies, mixed_parameters
from tests.tolerances import float64

RULES = sorted(sg.optim.__all__)
Options = dict[str, Any]


def product(**choices: list[Any]) -> Iterator[Options]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


ADAM = {
    "lr": [0.01],
    "betas": [(0.9, 0.999), (0.6, 0.9)],
    "eps": [1e-8, 1e-3],
    "weight_decay": [0.0, 0.1],
    "amsgrad": [False, True],
    "maximize": [False, True],
}
RECTIFIED = {k: v for k, v in ADAM.items() if k != "amsgrad"}
RECTIFIED["decoupled_weight_decay"] = [False, True]
OPTIONS: dict[str, list[Options]] = {
    "SGD": [
        options
        for options in product(
            lr=[0.05],
            momentum=[0.0, 0.9],
            dampening=[0.0, 0.3],
            weight_decay=[0.0, 0.1],
            nesterov=[False, True],
            maximize=[False, True],
        )
        # torch's constructor requires a momentum and no dampening for Nesterov momentum.
        if not options["nesterov"] or (options["momentum"] > 0 and options["dampening"] == 0)
    ],
    "Adam": list(product(**ADAM, decoupled_weight_decay=[False, True])),
    "AdamW": list(product(**ADAM)),
    "Adagrad": list(
        product(
            lr=[0.05],
            lr_decay=[0.0, 0.1],
            weight_decay=[0.0, 0.1],
            initial_accumulator_value=[0.0, 0.3],
            eps=[1e-10, 1e-3],
            maximize=[False, True],
        )
    ),
    "RMSprop": list(
        product(
            # With a decay that outweighs the gradients, the centered variance would cancel.
            lr=[0.001],
            alpha=[0.99, 0.9],
            eps=[1e-8, 1e-3],
            weight_decay=[0.0, 0.01],
            momentum=[0.0, 0.5],
            centered=[False, True],
            maximize=[False, True],
        )
    ),
    "Adamax": list(product(**{k: v for k, v in ADAM.items() if k != "amsgrad"})),
    "RAdam": list(product(**RECTIFIED)),
    "NAdam": list(product(**RECTIFIED, momentum_decay=[4e-3, 0.1])),
    "Adadelta": list(
        product(
            lr=[0.5],
            rho=[0.9, 0.5],
            eps=[1e-6, 1e-3],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        )
    ),
    "ASGD": list(
        product(
            lr=[0.05],
            lambd=[1e-4, 0.1],
            alpha=[0.75, 0.5],
            t0=[1e6, 3.0],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        )
    ),
    "Rprop": list(
        product(
            lr=[0.01],
            etas=[(0.5, 1.2), (0.3, 2.0)],
            step_sizes=[(1e-6, 50.0), (0.008, 0.02)],
            maximize=[False, True],
        )
    ),
    "Lion": list(
        product(
            lr=[0.01],
            betas=[(0.9, 0.99), (0.6, 0.9)],
            weight_decay=[0.0, 0.1],
            maximize=[False, True],
        )
    ),
}
# For each rule, one set of options that uses every feature.
RICH: dict[str, Options] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3},
    "RMSprop": {
        "lr": 0.001,
        "centered": True,
        "momentum": 0.5,
        "weight_decay": 0.01,
        "eps": 1e-3,
    },
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.1},
    "Adadelta": {"lr": 0.5, "weight_decay": 0.1, "eps": 1e-3},
    "ASGD": {"lr": 0.05, "lambd": 0.01, "t0": 5.0, "weight_decay": 0.1},
    "Rprop": {"lr": 0.01, "etas": (0.6, 1.1)},
    "Lion": {"lr": 0.01, "weight_decay": 0.1},
}


def name(options: Options) -> str:
    """Return the options that are not 0, as a test id."""
    return ",".join(f"{k}={v}" for k, v in options.items() if v and k != "lr") or "plain"


# The most common rules are tested over the full product of their options.
PRODUCTS = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"]


def cases(rule: str) -> Iterator[Any]:
    """Yield options in which every pair of values occurs, and all others of PRODUCTS for the CPU alone."""
    covered = covering([list(options.items()) for options in OPTIONS[rule]])
    for index, options in enumerate(OPTIONS[rule]):
        marks = [] if index in covered else [pytest.mark.once, pytest.mark.slow]
        if not marks or rule in PRODUCTS:
            wrap = index % 2 == 0
            yield pytest.param(rule, options, wrap, id=f"{rule}-{name(options)}", marks=marks)


CASES = [case for rule in RULES for case in cases(rule)]


@pytest.mark.parametrize(("rule", "options", "wrap"), CASES)
def test_every_option_equals_torch(
    backend: Backend, rule: str, options: Options, wrap: bool, request: pytest.FixtureRequest
) -> None:
    # Fewer steps where every pair of the options occurs in other cases.
    steps, swap_at = (20, 13) if request.node.get_closest_marker("once") is None else (9, 5)
    run_beside_torch(rule, options, device=backend.device, steps=steps, swap_at=swap_at, wrap=wrap)


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("rule", "options", "wrap"), CASES[::3])
@pytest.mark.full
def test_float64_equals_torch(
    backend: Backend,
    rule: str,
    options: Options,
    wrap: bool,
    default_dtype: Callable[[torch.dtype], None],
) -> None:
    if rule in ("NAdam", "ASGD"):
        # Numbers of their states have the default dtype until a checkpoint is loaded, and then that of the parameter.
        default_dtype(torch.float64)
    run_beside_torch(
        rule, options, device=backend.device, dtype=torch.float64, steps=12, swap_at=7, wrap=wrap
    )


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "subclass"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.full
def test_swaps_at_the_first_and_the_last_step(backend: Backend, rule: str, wrap: bool) -> None:
    for swap_at, steps in ((0, 8), (18, 20)):
        run_beside_torch(
            rule, RICH[rule], device=backend.device, steps=steps, swap_at=swap_at, wrap=wrap
        )


def arguments_of(rule: str) -> set[str]:
    return set(inspect.signature(plain_class(rule)).parameters)


def refuses_tensor_rates(rule: str) -> bool:
    """Tell whether torch's constructor refuses a tensor as the learning rate under ``foreach``."""
    try:
        make_torch(rule, [Parameter(torch.ones(1))], {"lr": torch.tensor(0.1), "foreach": True})
    except ValueError:
        return True
    return False


FLAGS: list[Options] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]
FLAGS += [{"fused": False}, {"foreach": False, "fused": False}]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["lr", "tensor-lr"])
@pytest.mark.parametrize("flags", FLAGS, ids=name)
@pytest.mark.parametrize("rule", RULES)
def test_flags_and_tensor_rates_equal_torch(
    backend: Backend, rule: str, flags: Options, as_tensor: bool
) -> None:
    flags = {k: v for k, v in flags.items() if k in arguments_of(rule)}
    if flags.get("foreach") and as_tensor and refuses_tensor_rates(rule):
        # torch's constructor refuses this, so there is nothing to wrap.
        with pytest.raises(ValueError, match="lr as a Tensor"):
            make_torch(rule, [Parameter(torch.ones(1))], {"lr": torch.tensor(0.1), **flags})
        return
    rate = RICH[rule]["lr"]
    options = {**RICH[rule], "lr": torch.tensor(rate) if as_tensor else rate, **flags}
    ours, torchs = run_beside_torch(
        rule, options, device=backend.device, steps=6, swap_at=2, dense=True
    )
    kept = ours.param_groups[0]["lr"]
    assert isinstance(kept, Tensor) == as_tensor == isinstance(torchs.param_groups[0]["lr"], Tensor)


@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
def test_tensor_betas_equal_torch(backend: Backend, rule: str) -> None:
    options = {"lr": 0.01, "betas": (torch.tensor(0.8), torch.tensor(0.95))}
    run_beside_torch(rule, options, device=backend.device, steps=10, dense=True)


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_rate_changed_in_place_counts(backend: Backend, rule: str) -> None:
    device = backend.device
    mine, theirs = mixed_parameters(device=device), mixed_parameters(device=device)
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    ours = sg.Stabilizer(plain_class(rule)(mine, lr=rates[0]), max_norm=1.0)
    torchs = make_torch(rule, theirs, {})
    torchs.param_groups[0]["lr"] = rates[1]
    for step, gradients in enumerate(shared_gradients(torch.float32, device, 8, False, 6.0)):
        for rate in rates:
            rate.fill_(0.1 / (step + 1))
        assign(mine, gradients)
        assign_copies(theirs, gradients)
        ours.step()
        clip_grad_norm_(theirs, 1.0)
        torchs.step()
    assert_same_params(mine, theirs, torch.float32)
    assert ours.path == "fused"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.full
def test_large_parameters_of_many_chunks(backend: Backend, rule: str) -> None:
    device = backend.device
    generator = torch.Generator().manual_seed(1)
    sizes = [(4095,), (4097,), (65537,), (333, 401), (5,), (16, 8, 33, 31)]
    values = [torch.randn(size, generator=generator) for size in sizes]
    values[3] = values[3].t()
    values[5] = values[5].contiguous(memory_format=torch.channels_last)
    mine = [Parameter(v.clone().to(device)) for v in values]
    theirs = [Parameter(v.clone().to(device)) for v in values]
    # If a decay cancels a gradient, rounding decides the first step of an adaptive rule.
    options = {k: 0.0 if k == "weight_decay" else v for k, v in RICH[rule].items()}
    ours = sg.Stabilizer(plain_class(rule)(mine, **options), max_norm=1.0)
    torchs = make_torch(rule, theirs, options)
    for step in range(5):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(device) * 10.0 ** (step - 2)
            other.grad = one.grad.clone()
        ours.step()
        clip_grad_norm_(theirs, 1.0)
        torchs.step()
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)
    assert ours.path == "fused"


def error(params: list[Parameter], exact: list[Parameter]) -> tuple[float, float]:
    """Return the root-mean-square and the largest error over all elements."""
    pairs = zip(params, exact, strict=True)
    difference = torch.cat([torch.as_tensor(float64(p) - float64(e)).reshape(-1) for p, e in pairs])
    return difference.square().mean().sqrt().item(), difference.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "subclass"])
@pytest.mark.parametrize("rule", RULES)
def test_half_types_are_as_exact_as_torch(
    backend: Backend, rule: str, dtype: torch.dtype, wrap: bool
) -> None:
    device = backend.device
    # In torch, float16 squares of clipped gradients under 1e-4 vanish, so the norms stay within four decades.
    sequence = shared_gradients(dtype, device, 20, False, 4.0)
    options = {**RICH[rule], **({"eps": 1e-3} if "eps" in arguments_of(rule) else {})}
    runs = [mixed_parameters(dtype, device) for _ in range(3)]
    mine, theirs, exact = runs
    with torch.no_grad():
        exact[:] = [Parameter(p.detach().double()) for p in exact]
    ours = make_ours(rule, mine, options, wrap, max_norm=1.0)
    others = [make_torch(rule, params, options) for params in (theirs, exact)]
    for gradients in sequence:
        assign(mine, gradients)
        assign_copies(theirs, gradients)
        assign_copies(exact, [None if g is None else g.double() for g in gradients])
        ours.step()
        for params, optimizer in zip((theirs, exact), others, strict=True):
            clip_grad_norm_([p for p in params if p.grad is not None], 1.0)
            optimizer.step()
    assert ours.path == "fused"
    (rms, largest), (torch_rms, torch_largest) = error(mine, exact), error(theirs, exact)
    assert rms <= 2 * torch_rms
    assert largest <= 2 * torch_largest
    for entries in ours.state_dict()["state"].values():
        for key, value in entries.items():
            assert value.dtype in ((torch.float32,) if key == "step" else (dtype, torch.float32))


def test_the_padding_of_strided_parameters_is_not_written(backend: Backend) -> None:
    for rule in RULES:
        base = torch.full((6, 9), 5.0, device=backend.device)
        param = Parameter(base[:, 2:7:2])
        param.grad = torch.ones(6, 3, device=backend.device)
        optimizer = sg.Stabilizer(plain_class(rule)([param], lr=0.1), max_norm=1.0)
        optimizer.step()
        assert optimizer.path == "fused"
        written = torch.zeros(9, dtype=torch.bool)
        written[2:7:2] = True
        assert torch.all(base[:, ~written] == 5.0) and torch.all(base[:, written] != 5.0)
