"""Clip policies in Python: what they are asked, what their limits do, and how their state is saved and loaded."""

from __future__ import annotations

import copy
import doctest
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import steadygrad as sg
from steadygrad import _kernels
from steadygrad.policies.state_text import state_of, text_of
from steadygrad.reference import policies as reference
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.device_twins import asynchronous_device, no_waiting
from tests.optim.optimizer_kinds import MAKERS
from tests.optim.optimizer_runs import tensor_state
from tests.optim.parameter_sets import dense_parameters
from tests.policies.policy_runs import Driven, assert_follows, finite, recorded_norms
from tests.policies.python_policies import Given, Median, ZScore
from tests.policies.test_policies import LoneReduction
from tests.policies.test_policy_state import HALF, NORMS, WAYS, model_on, run
from tests.snapshots import assert_same_tree

STEPS = 200
CPU = torch.device("cpu")


def in_place(groups: Any, lr: float, **ours: Any) -> Any:
    return sg.Stabilizer(unfused.Adadelta(groups, lr=lr), **ours)


def test_the_published_rule_again_agrees_with_its_reference(backend: Backend) -> None:
    driven, expected = Driven(1, backend.device, clip=ZScore()), reference.ClipZScore()
    for norm in recorded_norms(STEPS):
        (taken,) = driven.step(norm)
        if math.isfinite(norm):
            assert math.isclose(taken, norm * expected.coefficient(norm), rel_tol=1e-9)
        else:
            assert taken == 0
    assert driven.optimizer.path == backend.fused_path
    assert driven.optimizer.skipped_steps == STEPS - len(finite(recorded_norms(STEPS)))
    assert 0 < driven.optimizer.clipped_steps < STEPS


def test_a_running_median_agrees_with_numpy(backend: Backend) -> None:
    driven = Driven(1, backend.device, clip=Median())
    seen: list[float] = []
    for norm in finite(recorded_norms(STEPS)):
        (taken,) = driven.step(norm)
        limit = 2 * float(np.median(seen[-9:])) if seen else math.inf
        assert_follows(taken, norm, 1.0 if norm == 0 else min(1.0, limit / (norm + 1e-6)))
        seen += [norm] if norm > 0 else []


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_every_scope_has_its_own_limit(backend: Backend, scope: Any) -> None:
    driven = Driven(3, backend.device, clip=ZScore(), clip_scope=scope)
    definitions = [reference.ClipZScore() for _ in range(3)]
    rows = list(zip(*(finite(recorded_norms(60, seed)) for seed in range(3)), strict=False))
    for step, norms in enumerate(rows):
        given = [None if step % 7 == 3 and i == 1 else norm for i, norm in enumerate(norms)]
        for norm, taken, definition in zip(given, driven.step(*given), definitions, strict=True):
            if norm is not None:
                expected = norm * definition.coefficient(norm)
                assert math.isclose(taken, expected, rel_tol=1e-9)


def test_what_it_is_asked(backend: Backend) -> None:
    for scope, asked in (
        ("global", [5.0]),
        ("group", [3.0, 0.0, 4.0]),
        ("tensor", [3.0, 0.0, 4.0]),
    ):
        policy = Given(2.5)
        driven = Driven(3, backend.device, clip=policy, clip_scope=scope)
        driven.step(3.0, None, 4.0)
        assert policy.asked == [asked]
    policy = Given()
    params = dense_parameters(device=backend.device)
    optimizer = sg.optim.SGD(
        params, lr=0.1, clip=policy, norm_type=3.0, clip_scope="tensor", l2=0.5
    )
    for param in params:
        param.grad = torch.ones_like(param)
    expected = [
        (torch.ones_like(p, dtype=torch.float64) + 0.5 * p.detach().double())
        .abs()
        .pow(3)
        .sum()
        .pow(1 / 3)
        for p in params
    ]
    optimizer.step()
    assert np.allclose(policy.asked[0], [e.item() for e in expected], rtol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        2.0,
        2,
        np.float64(2.0),
        lambda norms: torch.full_like(norms, 2.0),
        lambda norms: norms.new_tensor(2.0).float(),
        lambda norms: torch.full_like(norms, 2, dtype=torch.int64),
    ],
    ids=["float", "int", "numpy", "tensor", "float32 scalar", "int64 tensor"],
)
def test_forms_of_a_limit(backend: Backend, given: Any) -> None:
    driven = Driven(2, backend.device, clip=Given(given))
    for norm, taken in zip((3.0, 4.0), driven.step(3.0, 4.0), strict=True):
        assert_follows(taken, norm, 2.0 / (5.0 + 1e-6))
    assert driven.optimizer.clipped_steps == 1
    driven.optimizer.param_groups[1]["max_norm"] = 1.0  # it caps the policy's limit
    assert_follows(driven.step(3.0, 4.0)[1], 4.0, 1.0 / (5.0 + 1e-6))


def test_no_limit(backend: Backend) -> None:
    driven = Driven(2, backend.device, clip=Given(math.inf))
    assert driven.step(3.0, 4.0) == [3.0, 4.0]
    assert driven.optimizer.clipped_steps == 0
    assert Driven(1, backend.device, clip=Given(0.0)).step(3.0) == [0.0]


BAD: list[tuple[Any, type[Exception], str]] = [
    (-1.0, ValueError, "expected a number >= 0, got -1.0"),
    (math.nan, ValueError, "expected a number >= 0, got nan"),
    (None, TypeError, "expected a number >= 0, got None"),
    ("much", TypeError, "expected a number >= 0, got 'much'"),
    (
        lambda norms: norms[:1],
        ValueError,
        r"expected a number, or a tensor of shape \(2,\) or \(\) on",
    ),
    (lambda norms: norms * 1j, TypeError, "expected a dense tensor .*got a torch.complex128"),
    (
        lambda norms: norms.to_sparse(),
        TypeError,
        "expected a dense tensor .*got a torch.sparse_coo",
    ),
    (
        lambda norms: norms.to(torch.float8_e4m3fn),
        TypeError,
        "expected a dense tensor .*got a torch.float8",
    ),
    (lambda norms: norms.to("meta"), ValueError, r"on meta"),
    (RuntimeError("no idea"), RuntimeError, "no idea"),
]


@pytest.mark.parametrize("make", [None, in_place], ids=["fused", "in-place"])
@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_a_bad_limit_changes_nothing(
    backend: Backend, given: Any, error: type[Exception], message: str, make: Any
) -> None:
    policy = Given(1.0)
    driven = Driven(
        2, backend.device, make, clip=policy, clip_scope="group", skip=sg.SkipSpikes(window=8)
    )
    driven.step(3.0, 4.0)
    before = copy.deepcopy(driven.optimizer.state_dict())
    before["param_groups"][0].pop("clip_state")
    policy.given = given
    match = (
        message if isinstance(given, RuntimeError) else rf"step: clip: Given\.limits: .*{message}"
    )
    with pytest.raises(error, match=match):
        driven.step(1.0, 2.0)
    assert [param.item() for param in driven.params] == [0.0, 0.0]
    after = driven.optimizer.state_dict()
    after["param_groups"][0].pop("clip_state")
    assert_same_tree(after["param_groups"][0], before["param_groups"][0])
    assert_same_tree(tensor_state(driven.optimizer), before["state"])
    policy.given = 1.0
    driven.step(1.0, 2.0)
    assert driven.optimizer.clipped_steps == 2


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_bad_element(backend: Backend, bad: float) -> None:
    policy = Given(lambda norms: torch.where(norms < 3.5, bad, 1.0))
    driven = Driven(2, backend.device, clip=policy, clip_scope="group")
    if backend.asynchronous:  # the host cannot see the limit, so it limits nothing
        first, second = driven.step(3.0, 4.0)
        assert first == 3.0
        assert_follows(second, 4.0, 1.0 / (4.0 + 1e-6))
    else:
        with pytest.raises(ValueError, match=rf"expected numbers >= 0.*got {bad} among them"):
            driven.step(3.0, 4.0)


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_steps_that_are_not_taken(backend: Backend, scope: Any) -> None:
    policy = Given(math.inf)
    driven = Driven(
        2, backend.device, clip=policy, clip_scope=scope, skip=sg.SkipSpikes(6, window=8)
    )
    for norm in [1.0, 1.1, 0.9] * 3:
        driven.step(norm, norm)
    asked = len(policy.asked)
    driven.step(math.nan, 1.0)
    driven.step(math.inf, 1.0)
    driven.step(100.0, 100.0)  # a spike
    driven.optimizer.found_inf = torch.ones((), device=backend.device)
    driven.step(1.0, 1.0)
    assert driven.optimizer.skipped_steps == 4
    scopes = 1 if scope == "global" else 2
    if backend.asynchronous:
        assert np.isnan(policy.asked[asked:]).all()
        assert np.shape(policy.asked[asked:]) == (4, scopes)
    else:
        assert len(policy.asked) == asked


def test_a_refused_step(backend: Backend) -> None:
    policy = Given(math.inf)
    driven = Driven(1, backend.device, clip=policy, nonfinite="raise")
    with pytest.raises(sg.NonfiniteGradientError):
        driven.step(math.inf)
    assert len(policy.asked) == (1 if backend.asynchronous else 0)


def test_nonfinite_norms_that_are_taken(backend: Backend) -> None:
    for nonfinite, seen in (("zero", [1.0]), ("propagate", [math.inf])):
        policy = Given(1.0)
        driven = Driven(2, backend.device, clip=policy, nonfinite=nonfinite)
        driven.step(math.inf, 1.0)
        assert policy.asked == [seen]


def test_a_step_that_only_makes_state_asks_nothing(backend: Backend) -> None:
    policy = Given(1.0)
    params = dense_parameters(device=backend.device)
    optimizer = sg.optim.AdamW(params, lr=0.0, clip=policy)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    # Only a device knows that the gradients are zero.
    assert policy.asked == ([[0.0]] if backend.asynchronous else [])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["AdamW", "subclass", "in-place"])
@pytest.mark.parametrize("make", [ZScore, Median])
def test_it_goes_on_as_if_nothing_had_happened(
    backend: Backend, make: Callable[[], sg.ClipPolicy], kind: str, way: str
) -> None:
    def begun() -> tuple[Any, Any]:
        model = model_on(backend.device)
        optimizer = MAKERS[kind](list(model.parameters()), clip=make())
        run(model, optimizer, NORMS[:HALF])
        return model, optimizer

    model, optimizer = begun()
    moved = WAYS[way](kind, model, optimizer, {"clip": make()})
    run(model, moved, NORMS[HALF:])
    expected_model, expected = begun()
    run(expected_model, expected, NORMS[HALF:])
    assert_same_tree(tensor_state(moved), tensor_state(expected))
    saved = moved.state_dict()["param_groups"]
    assert saved == expected.state_dict()["param_groups"]
    assert saved[0]["clip_state"][0] == make.__name__
    assert json.loads(json.dumps(saved[0]["clip_state"])) == saved[0]["clip_state"]
    assert_same_tree(dict(model.state_dict()), dict(expected_model.state_dict()))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_through_files_of_a_distributed_checkpoint(backend: Backend, tmp_path: Path) -> None:
    model = model_on(backend.device)
    optimizer = MAKERS["AdamW"](list(model.parameters()), clip=ZScore())
    run(model, optimizer, NORMS[:HALF])
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    policy = ZScore()
    fresh = MAKERS["AdamW"](list(model.parameters()), clip=policy)
    template = {"optimizer": get_optimizer_state_dict(model, fresh)}
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(model, fresh, optim_state_dict=template["optimizer"])
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    run(model, fresh, NORMS[HALF : HALF + 1])
    assert policy.mean is not None and policy.count.item() > HALF - 5


def test_a_copy_does_not_share_the_state(backend: Backend) -> None:
    policy = Median()
    driven = Driven(1, backend.device, clip=policy)
    driven.step(1.0)
    copied = copy.deepcopy(driven.optimizer)
    driven.step(2.0)
    assert policy.calls == 2
    assert isinstance(copied._options.clip, Median) and copied._options.clip.calls == 1


def test_the_same_optimizer_goes_back(backend: Backend) -> None:
    driven = Driven(1, backend.device, clip=Median())
    fresh = copy.deepcopy(driven.optimizer.state_dict())
    first = [driven.step(norm) for norm in finite(NORMS[:20])]
    saved = copy.deepcopy(driven.optimizer.state_dict())
    later = [driven.step(norm) for norm in finite(NORMS[20:40])]
    driven.optimizer.load_state_dict(saved)
    assert driven.optimizer.state_dict()["param_groups"] == saved["param_groups"]
    assert [driven.step(norm) for norm in finite(NORMS[20:40])] == later
    driven.optimizer.load_state_dict(fresh)  # the state before it had learnt anything
    assert [driven.step(norm) for norm in finite(NORMS[:20])] == first
    driven.optimizer.load_state_dict(saved)
    state = driven.optimizer.state_dict()
    for group in state["param_groups"]:
        group["clip_state"] = ["ClipMedian", "{}"]  # the state of another policy
    driven.optimizer.load_state_dict(state)
    assert [driven.step(norm) for norm in finite(NORMS[:20])] == first


def test_what_a_state_may_hold() -> None:
    state = {
        "number": 1.5,
        "none": None,
        "list": [1, [True, "two"], {"three": math.inf}],
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "whole": torch.arange(6).reshape(2, 3),
        "nan": torch.tensor(math.nan, dtype=torch.float64),
        "empty": torch.zeros(0, 3, dtype=torch.bool),
        "fine": torch.tensor([0.1, 1e-310, math.pi], dtype=torch.float64),
    }
    text = text_of("here", state)
    back = state_of(text, CPU)
    assert text_of("here", back) == text and list(back) == list(state)
    assert_same_tree(
        {k: v for k, v in back.items() if isinstance(v, torch.Tensor)},
        {k: v for k, v in state.items() if isinstance(v, torch.Tensor)},
    )
    for bad in (
        {"f": len},
        {1: 2},
        {"a": [torch.ones(1, dtype=torch.complex64)]},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
        {"__tensor__": 1},
    ):
        with pytest.raises(
            TypeError, match=r"here: state.*: expected a number, a string.*leave it out"
        ):
            text_of("here", {"inner": bad})
    with pytest.raises(TypeError, match=r"here: expected a dict, got \[\]"):
        text_of("here", [])


def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step() -> None:
    policy = Median()
    policy.schedule = len  # type: ignore[attr-defined]
    with pytest.raises(
        TypeError, match=r"Median\.state_dict: state\['schedule'\]: expected a number"
    ):
        Driven(1, CPU, clip=policy).step(1.0)


def test_no_policy_where_one_is_expected() -> None:
    with pytest.raises(TypeError, match="abstract"):
        sg.ClipPolicy()  # type: ignore[abstract]
    with pytest.raises(TypeError, match=r"Stabilizer: clip: expected a clip policy such as"):
        Driven(1, CPU, clip=Median)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_between_the_passes_of_many_processes(
    backend: Backend, scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    plain, reduced = (
        Driven(3, backend.device, clip=ZScore(), clip_scope=scope, telemetry=None) for _ in range(2)
    )
    rows = list(zip(*(recorded_norms(60, seed) for seed in range(3)), strict=True))
    expected = [plain.step(*norms) for norms in rows]
    hook = LoneReduction(reduced.params, 3)
    hook.rows = hook.rows if scope == "tensor" else hook.rows[:4]
    monkeypatch.setattr("steadygrad.optim.step.sharding_of", lambda *_: hook)
    assert [reduced.step(*norms) for norms in rows] == expected


def test_a_step_on_the_device_waits_for_nothing(backend: Backend) -> None:
    device = asynchronous_device(backend)
    params = dense_parameters(device=device)
    optimizer = sg.optim.AdamW(params, clip=ZScore(), skip=sg.SkipSpikes())
    for step in range(4):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + step)
        before = _kernels.launch_count()
        with no_waiting(device):
            optimizer.step()
        if step > 0:  # the launches are norm, sums, the policy's norms, decision and update
            assert _kernels.launch_count() - before == 5


def test_the_example_of_its_documentation(backend: Backend) -> None:
    model = torch.nn.Linear(3, 2).to(backend.device)
    (example,) = (
        test
        for test in doctest.DocTestFinder(recurse=False).find(
            sg.ClipPolicy, globs={"sg": sg, "torch": torch, "model": model}
        )
    )
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    optimizer, taken = example.globs["opt"], []
    for norm in (1.0, 1.5, 1.2, 100.0, math.nan, 1.0):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        model.weight.grad[0, 0] = norm  # type: ignore[index]
        optimizer.step()
        taken.append(optimizer.clipped_steps)
    assert taken == [0, 0, 0, 1, 1, 1]
    assert optimizer.skipped_steps == 1
    assert optimizer._options.clip.norms.isfinite().sum() == 5
