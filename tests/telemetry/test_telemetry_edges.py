"""Telemetry in programs that are more than one loop: streaks, interruptions, groups, names, other wrappers."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steadygrad as sg
from steadygrad.telemetry import CSVWriter
from tests.backends import Backend
from tests.telemetry.test_telemetry_writers import go_on, model_of, stepped


def param_on(backend: Backend, size: int = 2) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, device=backend.device))


def step(opt: Any, *values: float) -> list[str]:
    """Take steps with such gradients and return their outcomes."""
    found = []
    for value in values:
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, value)
        try:
            opt.step()
            found.append("ok")
        except sg.TooManySkippedSteps:
            found.append("stopped")
    return found


def test_a_stopped_training_goes_on(backend: Backend) -> None:
    telemetry = sg.Telemetry(every=4, stop_after_skips=4)
    opt = sg.optim.SGD([param_on(backend)], lr=0.1, telemetry=telemetry)
    assert step(opt, *[math.nan] * 4) == ["ok"] * 3 + ["stopped"]
    assert step(opt, *[1.0] * 9) == ["ok"] * 9
    assert "stopped" in step(opt, *[math.nan] * 8)


def test_a_streak_that_has_ended_stops_nothing(backend: Backend) -> None:
    telemetry = sg.Telemetry(every=8, stop_after_skips=4)
    opt = sg.optim.SGD([param_on(backend)], lr=0.1, telemetry=telemetry)
    found = step(opt, *[math.nan] * 6, *[1.0] * 14)
    assert found[6:] == ["ok"] * 14
    assert ("stopped" in found) == (not backend.asynchronous)


def test_a_report_in_between_hides_no_streak(backend: Backend) -> None:
    telemetry = sg.Telemetry(every=4, stop_after_skips=4)
    opt = sg.optim.SGD([param_on(backend)], lr=0.1, telemetry=telemetry)
    found = []
    for number in range(12):
        found += step(opt, math.nan)
        if number % 5 == 4:
            opt.report()
    assert "stopped" in found


def test_refused_steps_are_written(backend: Backend) -> None:
    records: list[sg.StepRecord] = []
    telemetry = sg.Telemetry(history=10, every=5, writers=[records.append])
    opt = sg.optim.SGD([param_on(backend)], lr=0.1, nonfinite="raise", telemetry=telemetry)
    for _ in range(25):
        with pytest.raises(sg.NonfiniteGradientError):
            step(opt, math.nan)
    opt.flush_telemetry()
    assert [record.step for record in records] == list(range(25))
    assert all(record.refused for record in records)


def test_a_writer_that_knows_its_optimizer_keeps_it_no_longer(backend: Backend) -> None:
    seen: list[int] = []

    class Run:
        def __init__(self) -> None:
            telemetry = sg.Telemetry(writers=[self.on_step])
            self.opt = sg.optim.AdamW([param_on(backend)], telemetry=telemetry)

        def on_step(self, record: sg.StepRecord) -> None:
            seen.append(record.step)

    run = Run()
    step(run.opt, 1.0, 1.0)
    left = weakref.ref(run.opt)
    del run
    gc.collect()
    assert left() is None
    assert seen == [0, 1]


def test_an_interruption_costs_no_writer_its_steps(tmp_path: Path) -> None:
    records: list[sg.StepRecord] = []

    def interrupted(record: sg.StepRecord) -> None:
        if record.step == 3:
            raise KeyboardInterrupt

    telemetry = sg.Telemetry(every=5, writers=[interrupted, records.append])
    model = model_of()
    with pytest.raises(KeyboardInterrupt):
        stepped(model, telemetry, 5)
    assert [record.step for record in records] == list(range(5))


def test_late_looks_lose_no_step(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if not backend.asynchronous or backend.device.type == "cuda":
        pytest.skip("pretends that copies take their time")
    from steadygrad.telemetry import recorder

    for late, history in ((1, 8), (1, 64), (2, 64)):
        looks = 0

        def is_there(snapshot: Any, late: int = late) -> bool:
            nonlocal looks
            looks += 1
            asked = vars(snapshot)["asked"] = vars(snapshot).get("asked", 0) + 1
            return bool(asked > late)

        monkeypatch.setattr(recorder._Snapshot, "is_there", is_there)
        records: list[sg.StepRecord] = []
        telemetry = sg.Telemetry(history=history, every=8, writers=[records.append])
        opt = sg.optim.SGD([param_on(backend)], lr=0.1, telemetry=telemetry)
        step(opt, *[1.0] * 80)
        opt.flush_telemetry()
        assert [record.step for record in records] == list(range(80)), (late, history)
        assert looks > 5


def test_the_limit_is_that_of_the_groups_with_gradients(backend: Backend) -> None:
    for frozen_at in (0, 1, 2):
        groups = [{"params": [param_on(backend)], "max_norm": 1.0} for _ in range(3)]
        groups[frozen_at]["max_norm"] = 7.0
        opt = sg.optim.SGD(groups, lr=0.1, telemetry="tensor")
        for number, group in enumerate(groups):
            for param in group["params"]:
                param.grad = None if number == frozen_at else torch.ones_like(param)
        opt.step()
        assert opt.report().history.limit.tolist() == [1.0]


def test_many_groups_reach_the_device(backend: Backend) -> None:
    groups = [{"params": [param_on(backend)], "max_norm": 2.0 + g} for g in range(60)]
    opt = sg.optim.SGD(groups, lr=1.0, clip_scope="group", telemetry="tensor")
    for number, group in enumerate(groups):
        for param in group["params"]:
            param.grad = torch.full_like(param, 100.0) if 30 <= number < 57 else None
    opt.step()
    for number, group in enumerate(groups):
        taken = float(group["params"][0].detach().norm())
        expected = 2.0 + number if 30 <= number < 57 else 0.0
        assert math.isclose(taken, expected, rel_tol=1e-5), number


def test_layers_that_are_unfrozen_have_not_exploded() -> None:
    head, backbone = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt = sg.optim.SGD([head, backbone], lr=0.1, telemetry="tensor")
    for number in range(40):
        head.grad = torch.ones(2)
        backbone.grad = torch.full((2,), 70.0) if number >= 20 else None
        opt.step()
    assert opt.report().explosions == []


@pytest.mark.parametrize("bad", [-5, 2**63 - 1, 2**70, None, "x", 1.5])
def test_a_checkpoint_with_a_bad_number_of_steps_is_refused(backend: Backend, bad: Any) -> None:
    opt = sg.optim.SGD([param_on(backend)], lr=0.1, telemetry="tensor")
    step(opt, 1.0)
    saved = opt.state_dict()
    saved["param_groups"][0]["recorded_steps"] = bad
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[0\]\['recorded_steps'\]"):
        opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"][0]["recorded_steps"] == 1
    # A value that was set after loading, and so was not checked there, is refused by the step.
    opt.param_groups[0]["recorded_steps"] = bad
    before = opt.param_groups[0]["params"][0].detach().clone()
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[0\]\['recorded_steps'\]"):
        step(opt, 1.0)
    assert torch.equal(opt.param_groups[0]["params"][0], before)


def test_one_wrapper_leaves_anothers_telemetry_alone(backend: Backend) -> None:
    inner = torch.optim.SGD([param_on(backend)], lr=0.1)
    first = sg.Stabilizer(inner, telemetry="global")
    step(first, 1.0, 1.0)
    sg.Stabilizer(inner)
    assert first.report().steps == 2


def test_a_group_without_names_joins_those_with_names(backend: Backend) -> None:
    for make in (sg.optim.SGD, lambda p, **o: sg.Stabilizer(torch.optim.SGD(p, lr=0.1), **o)):
        model = nn.Linear(2, 2).to(backend.device)
        opt = make(
            model.parameters(), **({"lr": 0.1} if make is sg.optim.SGD else {}), telemetry="tensor"
        )
        opt.name_parameters(model.named_parameters())
        late = param_on(backend)
        opt.add_param_group({"params": [late]})
        step(opt, 1.0)
        names = opt.report().history.names
        assert names == ("weight", "bias", "param_groups[1]['params'][0]")


def test_names_are_told_apart(backend: Backend, tmp_path: Path) -> None:
    params = [param_on(backend) for _ in range(3)]
    groups = [
        {"params": params[:1], "param_names": ["weight"]},
        {"params": params[1:2], "param_names": ["weight"]},
        {"params": params[2:], "param_names": ["a\nb"]},
    ]
    opt = sg.optim.SGD(
        groups, lr=0.1, telemetry=sg.Telemetry("tensor", writers=[CSVWriter(tmp_path / "a.csv")])
    )
    step(opt, 1.0)
    names = opt.report().history.names
    assert names[0].startswith("weight (param_groups[0]") and len(set(names)) == 3
    opt.plot(tmp_path / "a.png")
    again = sg.optim.SGD(
        groups, lr=0.1, telemetry=sg.Telemetry("tensor", writers=[CSVWriter(tmp_path / "a.csv")])
    )
    step(again, 1.0)
    again.flush_telemetry()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 3
    same = [("w", params[0]), ("w", params[1]), ("v", params[2])]
    with pytest.raises(ValueError, match="expected another name for each parameter, got 'w' for 2"):
        opt.name_parameters(same)


def test_a_file_that_vanishes_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_of()
    opt = stepped(model, sg.Telemetry(writers=[CSVWriter("a.csv")]), 2)
    opt.flush_telemetry()
    os.remove("a.csv")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    go_on(model, opt, 1)
    opt.flush_telemetry()
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("step,norm,")


def test_plots_of_odd_histories(tmp_path: Path) -> None:
    long = nn.Parameter(torch.zeros(2))
    dead = nn.Parameter(torch.zeros(2))
    named = [("layers.0." + "x" * 300, long), (r"w$\frac$", dead)]
    opt = sg.optim.SGD(named, lr=0.1, telemetry="tensor")
    for number in range(60):
        long.grad = torch.full((2,), 1e4 if number == 57 else 1.0)
        dead.grad = torch.full((2,), 0.0 if 20 <= number < 23 else 1.0)
        opt.step()
        if number == 0:
            opt.plot(tmp_path / "one.png")
    assert [e.step for e in opt.report().explosions] == [57]
    opt.plot(tmp_path / "long.png")


def test_a_stop_under_a_scaler_leaves_no_scale_behind(backend: Backend) -> None:
    for make in (sg.GradScaler, torch.amp.GradScaler):
        telemetry = sg.Telemetry(every=1, stop_after_skips=1)
        param = param_on(backend)
        opt = sg.optim.SGD([param], lr=0.1, telemetry=telemetry)
        scaler = make(backend.device.type, init_scale=512.0, backoff_factor=0.5)
        scaler.scale(torch.ones((), device=backend.device))
        param.grad = torch.full_like(param, math.inf)
        with contextlib.suppress(sg.TooManySkippedSteps):
            scaler.step(opt)
        assert "grad_scale" not in vars(opt)
        if make is sg.GradScaler:
            scaler.update()
            assert scaler.get_scale() == 256.0
        param.grad = torch.full_like(param, 1.0)
        opt.step()
        assert torch.allclose(param.detach().cpu(), torch.full((2,), -0.1))


def test_the_error_survives_pickling() -> None:
    opt = sg.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, telemetry="global")
    step(opt, 1.0)
    error = sg.TooManySkippedSteps(opt.report())
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert np.array_equal(again.report.history.norm, error.report.history.norm)
