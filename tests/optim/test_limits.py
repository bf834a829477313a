"""Limits that are set for all param groups at once, kept as Python's numbers, and compared with a checkpoint's."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.optim.options import LIMITS
from tests.optim.optimizer_kinds import MAKERS, give, make_twin
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import assert_same_tree, bits

all_kinds = pytest.mark.parametrize("kind", MAKERS)


def in_two_groups(kind: str, **ours: Any) -> tuple[list[Parameter], Any]:
    params = dense_parameters()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    return params, MAKERS[kind](groups, **ours)


def reloaded(optimizer: Any) -> Any:
    """Return the state dict after a file and torch's safe loader."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@all_kinds
@pytest.mark.parametrize("key", LIMITS)
def test_a_limit_that_is_set_holds_in_every_group(kind: str, key: str) -> None:
    params, optimizer = in_two_groups(kind)
    twins, twin = in_two_groups(kind, **{key: 0.25})
    setattr(optimizer, key, 0.25)
    assert getattr(optimizer, key) == 0.25
    assert [group[key] for group in optimizer.param_groups] == [0.25, 0.25]
    for seed in range(2):
        for each, stepped in ((params, optimizer), (twins, twin)):
            give(each, seed)
            stepped.step()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(params, twins, strict=True))
    assert optimizer.clipped_steps == twin.clipped_steps == (2 if key == "max_norm" else 0)


@all_kinds
def test_a_limit_can_be_changed_and_taken_away_between_steps(kind: str) -> None:
    params, optimizer = in_two_groups(kind, max_norm=1.0, clip_value=1)
    for limit, clipped in ((1.0, 1), (None, 1), (math.inf, 1), (0.5, 2)):
        optimizer.max_norm = optimizer.clip_value = limit
        assert optimizer.max_norm == optimizer.clip_value == limit
        give(params)
        optimizer.step()
        assert optimizer.clipped_steps == clipped


@pytest.mark.parametrize("clip", [sg.ClipNorm(2.0), sg.ClipZScore(max_norm=None), sg.Damp(5.0)])
@all_kinds
def test_beside_a_policy_it_is_a_cap(kind: str, clip: Any) -> None:
    params, optimizer = in_two_groups(kind, clip=clip)
    assert optimizer.max_norm == (2.0 if isinstance(clip, sg.ClipNorm) else None)
    optimizer.max_norm = 1e-3
    give(params)
    optimizer.step()
    assert optimizer.clipped_steps == 1
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.max_norm == 1e-3
        other.max_norm = 1.0
        other.step()
        other.add_param_group({"params": [Parameter(torch.zeros(2))]})
        assert other.param_groups[2]["max_norm"] == 1.0
    assert optimizer.max_norm == 1e-3


@all_kinds
def test_groups_that_differ_have_no_common_limit(kind: str) -> None:
    _, optimizer = in_two_groups(kind, l2=0.1)
    optimizer.param_groups[1].update(max_norm=0.5, l2=0.2)
    with pytest.raises(
        ValueError, match=r"max_norm: expected one value in all param groups, got None, 0\.5; read"
    ):
        _ = optimizer.max_norm
    with pytest.raises(ValueError, match=r"l2: .*read param_groups\[i\]\['l2'\]"):
        _ = optimizer.l2
    assert optimizer.clip_value is None
    optimizer.l2 = 0.3
    assert optimizer.l2 == 0.3


@all_kinds
def test_a_group_that_is_added_gets_the_value_set_last(kind: str) -> None:
    _, optimizer = in_two_groups(kind, max_norm=1.0, l1=0.1)
    optimizer.max_norm = 0.5
    optimizer.param_groups[0]["max_norm"] = 0.25  # sets this group alone
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))]})
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], "max_norm": 7.0})
    assert [group["max_norm"] for group in optimizer.param_groups] == [0.25, 0.5, 0.5, 7.0]
    assert optimizer.l1 == 0.1


@all_kinds
@pytest.mark.parametrize("key", LIMITS)
def test_a_bad_value_is_refused_as_the_constructor_refuses_it(kind: str, key: str) -> None:
    _, optimizer = in_two_groups(kind, **{key: 0.5})
    bad = [-1, math.nan, "much", *([None, math.inf] if key in ("l1", "l2") else [])]
    for value in bad:
        with pytest.raises((TypeError, ValueError)) as made:
            in_two_groups(kind, **{key: value})
        with pytest.raises(type(made.value)) as changed:
            setattr(optimizer, key, value)
        assert str(changed.value) == str(made.value)
    assert getattr(optimizer, key) == 0.5
    assert [group[key] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("number", [np.float64, np.float32, np.float16, Fraction, torch.tensor])
@all_kinds
def test_numbers_of_other_types_can_be_saved(kind: str, number: Callable[..., Any]) -> None:
    given = {key: number(0.5) for key in LIMITS}
    _, optimizer = in_two_groups(kind, **given)
    for group in optimizer.param_groups:
        assert {type(group[key]) for key in LIMITS} == {float}
    optimizer.max_norm = number(0.25)
    assert type(optimizer.param_groups[0]["max_norm"]) is float
    optimizer.param_groups[1]["max_norm"] = number(2.0)
    saved = reloaded(optimizer)
    assert [float(group["max_norm"]) for group in saved["param_groups"]] == [0.25, 2.0]


def test_numbers_of_numpy_in_every_option() -> None:
    f, n = np.float64, np.int64
    policies = [
        sg.ClipNorm(f(1)),
        sg.Damp(f(1), f(0.5)),
        sg.ClipPercentile(n(10), n(50)),
        sg.ClipZScore(f(2.5), f(0.9), n(3), f(1), f(1)),
        sg.ClipRelative(f(1.05), f(0.9), n(3), f(1)),
        sg.ClipAdaptive(f(0.01), f(1e-3)),
        sg.SkipSpikes(f(6), n(8)),
        sg.Telemetry(history=n(9), every=n(3), stop_after_skips=n(4)),
    ]
    for policy in policies:
        fields = [v for v in vars(policy).values() if v != () and not isinstance(v, str)]
        assert fields and {type(value) for value in fields} <= {int, float}, policy
    scheduler = sg.LRBackoff(
        MAKERS["SGD"](dense_parameters()), factor=f(0.5), recovery_steps=n(5), every=n(2)
    )
    assert not [v for v in scheduler.state_dict().values() if isinstance(v, np.generic)]
    options = MAKERS["SGD"](dense_parameters(), norm_type=f(2), rounding_seed=n(3))._options
    assert (type(options.norm_type), type(options.rounding_seed)) == (float, int)
    groups = sg.param_groups(torch.nn.Linear(2, 2), l1=f(0.1), weight_decay=np.float32(0.5))
    assert {type(group[key]) for group in groups for key in ("l1", "weight_decay")} == {float}
    with pytest.raises(TypeError, match=r"SkipSpikes: window: expected an int >= 2"):
        sg.SkipSpikes(window=f(8))  # type: ignore[arg-type]


@all_kinds
def test_a_clipping_of_numpy_can_be_saved(kind: str) -> None:
    _, optimizer = in_two_groups(kind, clip=sg.ClipAdaptive(np.float64(0.5)))
    optimizer.param_groups[1]["clipping"] = np.float64(0.25)
    saved = reloaded(optimizer)["param_groups"]
    assert [group["clipping"] for group in saved] == [0.5, 0.25]


@all_kinds
def test_loading_another_limit_than_was_asked_for_warns(kind: str) -> None:
    _, old = in_two_groups(kind, max_norm=1.0, l2=0.1)
    _, new = in_two_groups(kind, clip=sg.ClipZScore(), l2=0.2)
    with pytest.warns(UserWarning) as warned:
        new.load_state_dict(reloaded(old))
    (warning,) = warned
    assert warning.filename == __file__
    text = str(warning.message)
    assert "max_norm: loaded 1.0, asked for None; l2: loaded 0.1, asked for 0.2" in text
    assert "optimizer.max_norm = None; optimizer.l2 = 0.2" in text
    assert (new.max_norm, new.l2) == (1.0, 0.1)  # the checkpoint's values win, as for torch's lr
    new.add_param_group({"params": [Parameter(torch.zeros(2))]})
    assert new.param_groups.pop()["l2"] == 0.2
    new.max_norm, new.l2 = None, 0.2
    assert [group["max_norm"] for group in new.param_groups] == [None, None]


@all_kinds
def test_of_groups_that_differ_the_warning_says_which(kind: str) -> None:
    _, old = in_two_groups(kind, clip=sg.ClipAdaptive())
    old.param_groups[1]["clip_value"] = 3.0
    old.param_groups[0]["clipping"] = None
    _, new = in_two_groups(kind, clip=sg.ClipAdaptive())
    with pytest.warns(UserWarning) as warned:
        new.load_state_dict(old.state_dict())
    (warning,) = warned
    text = str(warning.message)
    assert "clip_value of param_groups[1]: loaded 3.0, asked for None" in text
    assert "optimizer.param_groups[1]['clip_value'] = None" in text
    assert "clipping of param_groups[0]: loaded None, asked for 0.01" in text


@all_kinds
def test_loading_the_limits_that_were_asked_for_is_silent(kind: str) -> None:
    _, old = in_two_groups(kind, max_norm=1, l2=np.float32(0.5))
    _, new = in_two_groups(kind, max_norm=1.0, l2=0.5)
    new.load_state_dict(reloaded(old))
    new.max_norm = old.max_norm = 0.25
    new.load_state_dict(reloaded(old))
    twin = make_twin(
        kind, [{"params": p} for p in (dense_parameters()[:1], dense_parameters()[1:])]
    )
    new.load_state_dict(twin.state_dict())
    assert new.max_norm == 0.25
    twin.load_state_dict(new.state_dict())
    assert_same_tree(reloaded(new)["param_groups"], new.state_dict()["param_groups"])
