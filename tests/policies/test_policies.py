"""Every policy compared with its definition, over recorded norms with spikes, on every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from steadygrad import _kernels
from steadygrad.distributed.norms import COLUMNS
from steadygrad.reference import policies as reference
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.device_twins import asynchronous_device, no_waiting
from tests.optim.parameter_sets import dense_parameters
from tests.policies.policy_runs import (
    CLIPS,
    LEARNING,
    SKIPS,
    Driven,
    assert_follows,
    finite,
    recorded_norms,
)
from tests.snapshots import bits


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_follows_its_reference(backend: Backend, name: str) -> None:
    case = CLIPS[name]
    driven, expected = Driven(1, backend.device, clip=case.policy()), case.reference()
    # There are fewer where a step takes long; the short windows are passed all the same.
    norms = recorded_norms(500 if backend.name == "cpu" else 260)
    for norm in norms:
        (taken,) = driven.step(norm)
        if math.isfinite(norm):
            assert_follows(taken, norm, expected.coefficient(norm))
        else:
            assert taken == 0
    assert driven.optimizer.path == backend.fused_path
    assert driven.optimizer.skipped_steps == len(norms) - len(finite(norms))
    assert 0 < driven.optimizer.clipped_steps < len(norms)


def test_a_long_history_is_kept_sorted(backend: Backend) -> None:
    # The window is longer than what a block of threads moves at a time.
    window, oldest = 2500, 700
    rng = np.random.default_rng(3)
    history = [float(norm) for norm in np.exp(rng.normal(0, 1, window))]
    driven = Driven(1, backend.device, clip=sg.ClipPercentile(60, window=window))
    saved = driven.optimizer.state_dict()
    ring = history[-oldest:] + history[:-oldest]
    saved["param_groups"][0]["clip_state"] = ["ClipPercentile", 1 + window, float(oldest), *ring]
    driven.optimizer.load_state_dict(saved)
    expected = reference.ClipPercentile(60, window)
    expected.norms = history
    for norm in [1e-9, 1e9, *np.exp(rng.normal(0, 2, 60)), *history[:3], 1e9, 1e-9]:
        (taken,) = driven.step(float(norm))
        assert_follows(taken, norm, expected.coefficient(float(norm)))
    assert sorted(driven.learnt()[0][3:]) == sorted(expected.norms)


@pytest.mark.parametrize("clip", [None, "zscore", "percentile-window"])
@pytest.mark.parametrize("name", SKIPS)
def test_spikes_are_skipped_as_the_reference_says(
    backend: Backend, name: str, clip: str | None
) -> None:
    policy = None if clip is None else CLIPS[clip].policy()
    limits = None if clip is None else CLIPS[clip].reference()
    driven = Driven(1, backend.device, clip=policy, skip=SKIPS[name].policy())
    spikes, skipped = SKIPS[name].reference(), 0
    for norm in recorded_norms():
        (taken,) = driven.step(norm)
        if not math.isfinite(norm) or spikes.skips(norm):
            skipped += 1
            assert taken == 0
        else:
            assert_follows(taken, norm, 1.0 if limits is None else limits.coefficient(norm))
    assert driven.optimizer.skipped_steps == skipped > 5


@pytest.mark.parametrize("scope", ["group", "tensor"])
@pytest.mark.parametrize("name", LEARNING)
def test_every_scope_learns_for_itself(backend: Backend, name: str, scope: Any) -> None:
    case = CLIPS[name]
    driven = Driven(3, backend.device, clip=case.policy(), clip_scope=scope)
    definitions = [case.reference() for _ in range(3)]
    rows = list(zip(*(finite(recorded_norms(150, seed)) for seed in range(3)), strict=False))
    for step, norms in enumerate(rows):
        given = [None if step % 7 == 3 and i == 1 else norm for i, norm in enumerate(norms)]
        total = math.hypot(*(norm for norm in given if norm is not None))
        took = driven.step(*given)
        for norm, taken, definition in zip(given, took, definitions, strict=True):
            if norm is None:
                continue
            of_total = {"total": total} if isinstance(definition, reference.ClipRelative) else {}
            assert_follows(taken, norm, definition.coefficient(norm, **of_total))


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate", "raise"])
def test_nonfinite_norms_teach_nothing(backend: Backend, name: str, nonfinite: Any) -> None:
    options = {"clip": CLIPS[name].policy(), "skip": sg.SkipSpikes(), "nonfinite": nonfinite}
    driven = Driven(2, backend.device, **options)
    for norm in finite(recorded_norms(60)):
        driven.step(norm, norm / 2)
    before = driven.learnt()
    for bad in (math.nan, math.inf):
        if nonfinite == "raise":
            with pytest.raises(sg.NonfiniteGradientError):
                driven.step(bad, 1.0)
        else:
            driven.step(bad, 0.0 if nonfinite == "zero" else 1.0)
        assert driven.learnt() == before
    if nonfinite == "zero":
        driven.step(math.nan, 1.5)  # the total norm is 1.5
        same = Driven(2, backend.device, **options)
        for norm in finite(recorded_norms(60)):
            same.step(norm, norm / 2)
        same.step(0.0, 1.5)
        assert driven.learnt() == same.learnt() != before


@pytest.mark.parametrize("name", LEARNING)
def test_skipped_steps_teach_nothing(backend: Backend, name: str) -> None:
    driven = Driven(1, backend.device, clip=CLIPS[name].policy(), skip=sg.SkipSpikes(6, window=40))
    for norm in [1.0, 1.1, 0.9] * 10:
        driven.step(norm)
    clip, skip = driven.learnt()
    driven.optimizer.found_inf = torch.ones((), device=backend.device)
    assert driven.step(1.0) == [0.0]
    assert driven.learnt() == [clip, skip]
    del driven.optimizer.found_inf
    # The clip does not learn from a spike, but the next spike is compared with it.
    assert driven.step(100.0) == [0.0]
    assert driven.learnt()[0] == clip and driven.learnt()[1] != skip
    assert driven.optimizer.skipped_steps == 2


def test_a_lasting_rise_is_not_skipped_for_ever(backend: Backend) -> None:
    driven = Driven(1, backend.device, skip=sg.SkipSpikes(3, window=20))
    for norm in [1.0, 1.1, 0.9] * 10:
        driven.step(norm)
    took = [driven.step(norm)[0] for norm in [9.0, 9.9, 8.1] * 7]
    assert took[0] == 0 and all(took[2:])


def test_a_constant_limit_in_its_two_spellings(backend: Backend) -> None:
    plain, spelt = (
        Driven(2, backend.device, max_norm=1.5),
        Driven(2, backend.device, clip=sg.ClipNorm(1.5)),
    )
    for norm in recorded_norms(60):
        for one, other in zip(plain.step(norm, 1.0), spelt.step(norm, 1.0), strict=True):
            assert one == other
    assert plain.optimizer.param_groups[0]["max_norm"] == 1.5
    assert (
        plain.optimizer.state_dict()["param_groups"] == spelt.optimizer.state_dict()["param_groups"]
    )


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_a_param_groups_own_limit_is_a_cap(backend: Backend, scope: Any) -> None:
    driven = Driven(2, backend.device, clip=sg.Damp(1.0), clip_scope=scope)
    driven.optimizer.param_groups[1]["max_norm"] = 0.5
    norms = [4.0, 3.0]
    norm = {"global": [5.0, 5.0]}.get(scope, norms)
    first, second = driven.step(*norms)
    assert_follows(first, norms[0], reference.Damp(1.0).coefficient(norm[0]))
    assert_follows(second, norms[1], 0.5 / (norm[1] + 1e-6))


@pytest.mark.parametrize("name", ["percentile-window", "zscore-capped", "relative"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_around_an_optimizer_without_a_fused_rule(backend: Backend, name: str, scope: Any) -> None:
    def in_place(groups: Any, lr: float, **ours: Any) -> Any:
        return sg.Stabilizer(unfused.Adadelta(groups, lr=lr), **ours)

    norms = recorded_norms(120)
    ours = {"skip": sg.SkipSpikes(5, window=16), "clip_scope": scope}
    runs = [
        Driven(2, backend.device, make, clip=CLIPS[name].policy(), **ours)
        for make in (in_place, None)
    ]
    for norm in norms:
        for driven in runs:
            driven.step(norm, norm / 2)
    assert runs[0].optimizer.path.startswith("in-place")
    assert runs[0].learnt() == runs[1].learnt()
    assert runs[0].optimizer.skipped_steps == runs[1].optimizer.skipped_steps > 3
    assert runs[0].optimizer.clipped_steps == runs[1].optimizer.clipped_steps > 3


class LoneReduction:
    """A reduction over one process, which takes the same path as one over many."""

    def __init__(self, params: list[Parameter], groups: int) -> None:
        device = params[0].device
        rows = 1 + groups + len(params)
        self.rows = torch.full((rows, COLUMNS), math.nan, dtype=torch.float64, device=device)
        self.counted = torch.ones(len(params), dtype=torch.int32, device=device)

    @property
    def reduction(self) -> Any:
        return _kernels.Reduction(rows=self.rows, counted=self.counted, reduce=self)

    def __call__(self) -> None:
        pass

    def on_any_rank(self, flag: bool) -> bool:
        return flag

    def gradients(self, sums: dict[Tensor, Tensor]) -> None:
        return None


@pytest.mark.parametrize("name", ["percentile-window", "zscore", "relative"])
@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_between_the_passes_of_many_processes(
    backend: Backend, name: str, scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"clip": CLIPS[name].policy(), "skip": sg.SkipSpikes(5, window=16), "telemetry": None}
    plain, reduced = (Driven(3, backend.device, clip_scope=scope, **options) for _ in range(2))
    rows = list(zip(*(recorded_norms(100, seed) for seed in range(3)), strict=True))
    expected = [plain.step(*norms) for norms in rows]
    hook = LoneReduction(reduced.params, 3)
    if scope == "group":
        hook.rows = hook.rows[:4]
    monkeypatch.setattr("steadygrad.optim.step.sharding_of", lambda *_: hook)
    assert [reduced.step(*norms) for norms in rows] == expected
    assert reduced.learnt() == plain.learnt()


@pytest.mark.parametrize("name", ["percentile", "zscore", "relative", "damp"])
def test_a_step_on_the_device_waits_for_nothing_and_launches_no_more(
    backend: Backend, name: str
) -> None:
    device = asynchronous_device(backend)
    params = dense_parameters(device=device)
    optimizer = sg.optim.AdamW(params, clip=CLIPS[name].policy(), skip=sg.SkipSpikes())
    for step in range(4):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + step)
        before = _kernels.launch_count()
        with no_waiting(device):
            optimizer.step()
        if step > 0:
            assert _kernels.launch_count() - before == 3


def test_a_step_that_only_makes_state_teaches_nothing(backend: Backend) -> None:
    # torch.distributed.checkpoint makes such a step: zero gradients, a rate of 0, and no state yet.
    params = dense_parameters(device=backend.device)
    optimizer = sg.optim.AdamW(params, lr=0.0, clip=sg.ClipPercentile(window=5))
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["clip_state"] in (None, ["ClipPercentile", 0])


def test_a_scaler_takes_no_spike_for_an_overflow(backend: Backend) -> None:
    params = [Parameter(torch.zeros(1, device=backend.device))]
    optimizer = sg.optim.SGD(params, lr=1.0, skip=sg.SkipSpikes(3, window=8))
    scaler = sg.GradScaler(device=backend.device.type, init_scale=4.0, growth_interval=10**6)
    scaler.scale(torch.ones((), device=backend.device))
    for norm in (1.0, 1.1, 0.9, 1.0, 1.05, 50.0, math.inf):
        params[0].grad = torch.full_like(params[0], norm * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (2.0 if math.isinf(norm) else 4.0)
    assert optimizer.skipped_steps == 2


def test_the_same_bits_for_the_same_norms(backend: Backend) -> None:
    runs = [Driven(1, backend.device, clip=sg.ClipZScore(max_norm=None)) for _ in range(2)]
    for norm in recorded_norms(100):
        taken = [torch.tensor(driven.step(norm), dtype=torch.float64) for driven in runs]
        assert torch.equal(bits(taken[0]), bits(taken[1]))
    assert runs[0].learnt() == runs[1].learnt()
