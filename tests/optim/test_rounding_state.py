"""What is kept for half-precision parameters: how it is made, skipped, saved, loaded, copied and refused."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.optim.options import StabilizerOptions
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.device_twins import no_waiting
from tests.optim.optimizer_runs import make_torch
from tests.optim.parameter_sets import dense_parameters
from tests.optim.rounded_runs import (
    EXTRAS,
    HYPER,
    assert_same_run,
    give,
    make,
    params_of,
    resumed,
    step,
)
from tests.snapshots import Snapshot, assert_refused, assert_same_tree, bits

ROUNDINGS = ["stochastic", "kahan", "master"]
BF16 = torch.bfloat16
both_ways = pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "subclass"])
every_rounding = pytest.mark.parametrize("how", ROUNDINGS)
# The rules have no state, state tensors, and state tensors with a counter.
rules = pytest.mark.parametrize("rule", ["plain", "SGD", "AdamW"])


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "expected", "got"),
    [
        ({"rounding": "up"}, ValueError, "'nearest', 'stochastic', 'kahan', 'master'", "'up'"),
        ({"state_dtype": torch.float16}, ValueError, "None or torch.float32", "float16"),
        ({"state_dtype": torch.float64}, ValueError, "None or torch.float32", "float64"),
        ({"rounding_seed": -1}, ValueError, r"an int in \[0, 2\*\*64\)", "-1"),
        ({"rounding_seed": 2**64}, ValueError, r"an int in \[0, 2\*\*64\)", str(2**64)),
        ({"rounding_seed": 1.5}, TypeError, "an int", "1.5"),
        ({"rounding_seed": True}, TypeError, "an int", "True"),
    ],
)
@both_ways
def test_options_that_are_none(
    options: dict[str, Any], error: type[Exception], expected: str, got: str, wrap: bool
) -> None:
    params = dense_parameters(BF16)
    assert_refused(
        lambda: make("AdamW", params, wrap, **options),
        error,
        function="Stabilizer",
        argument=next(iter(options)),
        expected=expected,
        got=got,
    )


@both_ways
@pytest.mark.parametrize("where", [0, 2])
def test_no_master_copies_of_fp64(backend: Backend, wrap: bool, where: int) -> None:
    params = dense_parameters(BF16, backend.device)
    params[where] = Parameter(params[where].detach().double())
    optimizer = make("AdamW", params, wrap, rounding="master")
    give(params, 0)
    params[where].grad = None  # the parameter is refused even without a gradient
    assert_refused(
        optimizer.step,
        ValueError,
        function="step",
        argument=rf"parameters\[{where}\]",
        expected="float32, bfloat16 or float16 for rounding='master'",
        got="float64",
        unchanged=[Snapshot(params, optimizer)],
    )


@pytest.mark.parametrize("option", [{"rounding": "kahan"}, {"state_dtype": torch.float32}])
@pytest.mark.parametrize("why", ["no fused rule for NAdam", "differentiable=True", "sparse"])
def test_no_other_storage_on_the_in_place_path(
    backend: Backend, why: str, option: dict[str, Any]
) -> None:
    params = dense_parameters(BF16, backend.device)
    if why == "differentiable=True":
        wrapped = torch.optim.SGD(params, lr=0.1, differentiable=True)
    elif why == "sparse":
        wrapped = torch.optim.SGD(params, lr=0.1)
    else:
        wrapped = unfused.NAdam(params)
    optimizer = sg.Stabilizer(wrapped, **option)
    give(params, 0)
    if why == "sparse":
        optimizer.step()
        grad = params[2].grad
        assert grad is not None
        params[2].grad = grad.to_sparse()
    (name,) = option
    for _ in range(2):
        assert_refused(
            optimizer.step,
            ValueError,
            function="step",
            argument=name,
            expected=f"expected {'None' if name == 'state_dtype' else 'nearest'}.*{why}".replace(
                "expected nearest", "expected 'nearest'"
            ),
            got="kahan|float32",
            unchanged=[Snapshot(params, optimizer)],
        )
    if why == "sparse":
        step(optimizer, params, 1)


# -- what is made and what is left alone -------------------------------------------------------------


@rules
@every_rounding
def test_other_dtypes_are_updated_as_ever(backend: Backend, how: str, rule: str) -> None:
    dtypes = [torch.float32, *([torch.float64] if how != "master" else [])]
    for dtype in dtypes:
        mixed = dense_parameters(BF16, backend.device) + dense_parameters(dtype, backend.device, 1)
        plain = dense_parameters(dtype, backend.device, 1)
        ours = make(rule, mixed, rounding=how, state_dtype=torch.float32)
        twin = make(rule, plain)
        for seed in range(3):
            give(mixed, seed)
            for param, other in zip(mixed[-len(plain) :], plain, strict=True):
                other.grad = None if param.grad is None else param.grad.clone()
            ours.step()
            twin.step()
        for param, other in zip(mixed[-len(plain) :], plain, strict=True):
            assert torch.equal(bits(param), bits(other))
            assert_same_tree(dict(ours.state[param]), dict(twin.state[other]))
        for param in mixed[: -len(plain)]:
            assert how == "stochastic" or EXTRAS[how] in ours.state[param]


def test_dtypes_of_new_state(backend: Backend) -> None:
    for dtype in (BF16, torch.float16, torch.float32, torch.float64):
        for asked in (None, torch.float32):
            params = dense_parameters(dtype, backend.device)
            optimizer = make("AdamW", params, state_dtype=asked)
            step(optimizer, params, 0)
            wide = asked if dtype in (BF16, torch.float16) and asked is not None else dtype
            for param in params:
                state = optimizer.state[param]
                assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
                assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wide
                assert state["exp_avg"].stride() == param.stride()


def test_half_precision_state_is_widened_as_it_is(backend: Backend) -> None:
    params = dense_parameters(BF16, backend.device)
    optimizer = make("AdamW", params)
    step(optimizer, params, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    ours = resumed(optimizer, "AdamW", params, True, state_dtype=torch.float32)
    assert all(state["exp_avg"].dtype == BF16 for state in ours.state.values())
    give(params_of(ours), 2, bad=float("nan"))
    ours.step()
    for index, state in ours.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], saved["state"][index][name].float())
    step(ours, params_of(ours), 3)
    assert all(state["exp_avg"].dtype == torch.float32 for state in ours.state.values())
    assert all(float(state["step"]) == 3 for state in ours.state.values())


@rules
@every_rounding
@both_ways
def test_a_skipped_step_leaves_everything(
    backend: Backend, how: str, rule: str, wrap: bool
) -> None:
    params = dense_parameters(BF16, backend.device)
    optimizer = make(rule, params, wrap, rounding=how)
    for seeds in ([], [0, 1]):
        step(optimizer, params, *seeds)
        give(params, 7, bad=float("inf"))
        before = Snapshot(params, optimizer, counters=False)
        optimizer.step()
        before.assert_unchanged()
    assert optimizer.skipped_steps == 2
    if how == "stochastic":
        assert optimizer.param_groups[0]["rounded_steps"] == 2


@rules
def test_a_kept_value_that_is_missing_is_made_and_nothing_else(backend: Backend, rule: str) -> None:
    for how in ("kahan", "master"):
        params = dense_parameters(BF16, backend.device)
        before = make(rule, params)
        step(before, params, 0, 1)
        ours = resumed(before, rule, params, True, rounding=how) if rule != "plain" else None
        ours = ours or make(rule, [Parameter(p.detach().clone()) for p in params], rounding=how)
        mine = params_of(ours)
        give(mine, 5, bad=float("nan"))
        ours.step()
        for param, old in zip(mine, params, strict=True):
            assert torch.equal(bits(param), bits(old))
        step(ours, mine, 2)
        step(before, params, 2)
        for param, old in zip(mine, params, strict=True):
            state, want = dict(ours.state[param]), dict(before.state[old])
            kept = state.pop(EXTRAS[how])
            assert kept.dtype == (torch.float32 if how == "master" else BF16)
            assert_same_tree(state, want)
            assert torch.equal(bits(param), bits(old))  # nothing had been lost yet


@rules
@every_rounding
def test_a_parameter_that_was_written_counts(backend: Backend, how: str, rule: str) -> None:
    params = dense_parameters(BF16, backend.device)
    optimizer = make(rule, params, rounding=how, state_dtype=torch.float32)
    step(optimizer, params, 0, 1)
    same = resumed(optimizer, "SGD" if rule == "plain" else rule, params, True)
    fresh = make(
        rule,
        [Parameter(p.detach().clone()) for p in params],
        rounding=how,
        state_dtype=torch.float32,
    )
    fresh.load_state_dict(same.state_dict())
    with torch.no_grad():
        for some in (params, params_of(fresh)):
            some[2].view(-1)[::3] = 0.0
        name = EXTRAS.get(how)
        if name is not None:
            # The result is as if the kept state had been made from the written elements.
            kept = fresh.state[params_of(fresh)[2]][name]
            kept.view(-1)[::3] = 0.0
    step(optimizer, params, 2)
    step(fresh, params_of(fresh), 2)
    for one, other in zip(params, params_of(fresh), strict=True):
        assert torch.equal(bits(one), bits(other))
        assert_same_tree(dict(optimizer.state[one]), dict(fresh.state[other]))


@every_rounding
def test_parameters_that_change_their_dtype(backend: Backend, how: str) -> None:
    params = dense_parameters(torch.float32, backend.device)
    optimizer = make("AdamW", params, rounding=how)
    step(optimizer, params, 0)
    with torch.no_grad():
        for param in params:
            param.data, param.grad = param.data.to(BF16), None
    step(optimizer, params, 1)
    for param in params:
        assert how == "stochastic" or EXTRAS[how] in optimizer.state[param]
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32
    with torch.no_grad():
        for param in params:
            param.data, param.grad = param.data.float(), None
    step(optimizer, params, 2)
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())


# -- the count of steps ------------------------------------------------------------------------------


@rules
@both_ways
def test_steps_are_counted_without_waiting(backend: Backend, rule: str, wrap: bool) -> None:
    params = dense_parameters(BF16, backend.device)
    optimizer = make(rule, params, wrap, rounding="stochastic")
    step(optimizer, params, 0)
    give(params, 1)
    if backend.asynchronous:
        with no_waiting(backend.device):
            optimizer.step()
    else:
        optimizer.step()
    optimizer.add_param_group({"params": dense_parameters(BF16, backend.device, 9)})
    step(optimizer, params_of(optimizer), 2)
    assert optimizer.skipped_steps == 0
    assert [group["rounded_steps"] for group in optimizer.param_groups] == [3, 3]


def test_only_stochastic_rounding_counts(backend: Backend) -> None:
    for how in ("nearest", "kahan", "master"):
        params = dense_parameters(BF16, backend.device)
        optimizer = make("AdamW", params, rounding=how)
        step(optimizer, params, 0)
        assert all("rounded_steps" not in group for group in optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@rules
@both_ways
def test_a_resumed_run_goes_on_with_the_same_bits(
    backend: Backend, rule: str, wrap: bool, nonfinite: str
) -> None:
    options = {"rounding": "stochastic", "rounding_seed": 11, "nonfinite": nonfinite}
    params = dense_parameters(BF16, backend.device)
    optimizer = make(rule, params, wrap, **options)
    step(optimizer, params, 0, 1)
    give(params, 2, bad=float("nan"))
    if nonfinite == "raise":
        with pytest.raises(RuntimeError):
            optimizer.step()
    else:
        optimizer.step()
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    again = make(rule, [Parameter(p.detach().clone()) for p in params], wrap, **options)
    other_seed = make(
        rule,
        [Parameter(p.detach().clone()) for p in params],
        wrap,
        **{**options, "rounding_seed": 12},
    )
    for made in (again, other_seed):
        # The optimizer has been used already; its own count is replaced.
        made_params = params_of(made)
        start = [p.detach().clone() for p in made_params]
        step(made, made_params, 5, 6, 7)
        with torch.no_grad():
            for param, value in zip(made_params, start, strict=True):
                param.copy_(value)
        stream.seek(0)
        made.load_state_dict(torch.load(stream))
    for made in (optimizer, again, other_seed):
        step(made, params_of(made), 3, 4)
    assert optimizer.state_dict()["param_groups"][0]["rounded_steps"] == 4
    assert_same_run(optimizer, again)
    assert any(not torch.equal(a, b) for a, b in zip(params, params_of(other_seed), strict=True))


# -- checkpoints and copies ----------------------------------------------------------------------------


@every_rounding
@both_ways
def test_a_checkpoint_keeps_every_bit(backend: Backend, how: str, wrap: bool) -> None:
    for dtype in (BF16, torch.float16):
        params = dense_parameters(dtype, backend.device)
        options: dict[str, Any] = {"rounding": how, "state_dtype": torch.float32}
        optimizer = make("AdamW", params, wrap, **options)
        step(optimizer, params, 0, 1)
        again = resumed(optimizer, "AdamW", params, wrap, **options)
        assert_same_run(optimizer, again)
        for made in (optimizer, again):
            step(made, params_of(made), 2, 3)
        assert_same_run(optimizer, again)


@both_ways
@every_rounding
def test_torch_loads_and_steps(backend: Backend, how: str, wrap: bool) -> None:
    params = dense_parameters(BF16, backend.device)
    optimizer = make("AdamW", params, wrap, rounding=how, state_dtype=torch.float32)
    step(optimizer, params, 0, 1)
    copies = [Parameter(p.detach().clone()) for p in params]
    torchs = make_torch("AdamW", copies, HYPER["AdamW"])
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give(copies, 2)
    torchs.step()
    assert all(not torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    # On the way back, torch has rounded all state, also the master copy, which is made anew.
    ours = make("AdamW", copies, wrap, rounding=how, state_dtype=torch.float32)
    ours.load_state_dict(torchs.state_dict())
    assert all(state["exp_avg"].dtype == BF16 for state in ours.state.values())
    step(ours, copies, 3)
    for param in copies:
        state = ours.state[param]
        assert float(state["step"]) == 4
        assert state["exp_avg"].dtype == torch.float32
        if how == "master":
            assert state["master_param"].dtype == torch.float32
            assert torch.equal(state["master_param"].to(BF16), param.detach())


@every_rounding
@both_ways
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(backend: Backend, copied: Any, how: str, wrap: bool) -> None:
    params = dense_parameters(BF16, backend.device)
    optimizer = make("SGD", params, wrap, rounding=how, rounding_seed=4)
    step(optimizer, params, 0, 1)
    other = copied(optimizer)
    for made in (optimizer, other):
        step(made, params_of(made), 2, 3)
    assert_same_run(optimizer, other)


def test_options_pickled_before_there_were_these() -> None:
    options = StabilizerOptions(max_norm=1.0)
    for name in ("state_dtype", "rounding", "rounding_seed"):
        del options.__dict__[name]
    assert options.storage.rounding == "nearest" and options.storage.state_dtype is None


# -- what it is for -----------------------------------------------------------------------------------


def test_small_steps_arrive(backend: Backend) -> None:
    """Train a linear model in bf16 at a learning rate whose updates round to nothing."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator).to(backend.device)
    weights = {}
    for how, dtype in [("fp32", torch.float32), *((how, BF16) for how in ("nearest", *ROUNDINGS))]:
        layer = nn.Linear(8, 1, bias=False).to(backend.device, dtype)
        nn.init.ones_(layer.weight)
        optimizer = sg.Stabilizer(
            torch.optim.SGD(layer.parameters(), lr=1e-3),
            rounding="nearest" if how == "fp32" else how,  # type: ignore[arg-type]
        )
        for _ in range(200):
            optimizer.zero_grad()
            error = layer(inputs.to(dtype)).float() - inputs.sum(1, keepdim=True) * 1.5
            (error**2).mean().backward()
            optimizer.step()
        weights[how] = layer.weight.detach().float()
    assert bool((weights["nearest"] == 1).all())
    assert float((weights["fp32"] - 1).min()) > 0.08
    for how in ROUNDINGS:
        assert float((weights[how] - weights["fp32"]).abs().max()) < 0.04, how


@pytest.mark.parametrize("optimizer", [sg.optim.Adagrad, sg.optim.SGD, sg.optim.AdamW])
def test_a_skipped_step_does_not_widen_state(backend: Backend, optimizer: Any) -> None:
    param = Parameter(torch.ones(3, dtype=BF16, device=backend.device))
    momentum = {"momentum": 0.9} if optimizer is sg.optim.SGD else {}
    made = optimizer([param], lr=0.1, state_dtype=torch.float32, **momentum)
    narrow = optimizer([param], lr=0.1, **momentum)
    param.grad = torch.full((3,), 1.2, dtype=BF16, device=backend.device)
    narrow.step()
    made.state[param] = copy.deepcopy(narrow.state[param])
    held = {name for name, value in made.state[param].items() if value.dtype == BF16}
    param.grad.fill_(torch.nan)
    made.step()
    assert made.state_dict()["param_groups"][0]["skipped_steps"] == 1 and held
    assert all(made.state[param][name].dtype == BF16 for name in held)
    param.grad.fill_(1.2)
    made.step()
    made.state_dict()
    assert all(made.state[param][name].dtype == torch.float32 for name in held)
