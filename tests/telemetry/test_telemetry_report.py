"""The report and the plot say which parameter exploded, when, and how often steps were clipped and skipped."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steadygrad as sg
from steadygrad.telemetry import History, Report
from steadygrad.telemetry.history import NORM, TOTALS
from steadygrad.telemetry.recorder import Recorder
from steadygrad.telemetry.report import usual_norms
from tests.backends import Backend
from tests.integrations.documented_snippets import snippets
from tests.optim.optimizer_kinds import MAKERS

PLANTED = 37


def trained(backend: Backend | None, steps: int = 60, **options: Any) -> Any:
    """Train a network in which the gradient of one layer explodes, and return its optimizer."""
    device = torch.device("cpu") if backend is None else backend.device
    model = nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2)
    ).to(device)
    opt = sg.Stabilizer(torch.optim.SGD(model.named_parameters(), lr=0.05), **options)
    for step in range(steps):
        inputs = torch.randn(32, 6, device=device)
        # Gradients flow backwards: layers before the one that explodes explode with it, but less.
        times = 1e4 if step == PLANTED else 1.0
        handle = model[2].weight.register_hook(lambda grad, times=times: grad * times)
        opt.zero_grad()
        (model(inputs) - inputs[:, :2]).pow(2).mean().backward()
        handle.remove()
        opt.step()
    return opt


def test_the_report_names_parameter_and_step(backend: Backend) -> None:
    report = trained(backend, max_norm=1.0, telemetry="tensor").report()
    (explosion,) = report.explosions
    assert (explosion.step, explosion.name) == (PLANTED, "2.weight")
    assert 1e3 < explosion.times < 1e5
    assert f"step {PLANTED}: 2.weight (norm " in str(report)
    assert report.steps == 60 and report.skipped_steps == []
    assert report.clip_rate == report.history.clipped.mean() > 0
    assert report.norm_quantiles[1.0] == report.history.norm[PLANTED]


def test_the_total_alone_names_the_step() -> None:
    report = trained(None, max_norm=1.0, telemetry="global").report()
    assert [(e.step, e.name) for e in report.explosions] == [(PLANTED, "all gradients")]


def test_a_clip_that_cuts_every_step_is_said_to_hide_the_cause() -> None:
    layers: list[nn.Module] = []
    for _ in range(9):
        layers += [nn.Linear(20, 20), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, 0.0, 2 * (2 / 20) ** 0.5)  # type: ignore[arg-type]
    model = nn.Sequential(*layers)
    opt = sg.Stabilizer(torch.optim.SGD(model.parameters(), lr=0.01), max_norm=1.0)
    inputs = torch.randn(32, 20)
    for _ in range(30):
        opt.zero_grad()
        model(inputs).pow(2).mean().backward()
        opt.step()
    (conclusion,) = opt.report().conclusions
    times = np.median(opt.telemetry.norm)
    start = f"every step is cut, in the median to a {times:,.0f}th: the clip holds the symptom and not the cause. "
    assert conclusion.startswith(start) and "sg.examine(model, loss_function" in conclusion
    assert str(opt.report()).endswith(f"\n=> {conclusion}")


def test_a_lost_run_names_step_and_parameter_and_the_line_to_call() -> None:
    opt = trained(None, nonfinite="skip", steps=3)
    model = opt.param_groups[0]["params"]
    model[2].grad.fill_(math.nan)
    opt.step()
    (conclusion,) = opt.report().conclusions
    assert conclusion.startswith("the gradient of 2.weight was not finite at step 3. sg.examine(")
    assert 'at="first_nonfinite"' in conclusion


def test_no_conclusions_from_steps_as_usual() -> None:
    assert trained(None, max_norm=1.0).report().conclusions == []
    assert trained(None, max_norm=0.2).report().conclusions == []


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    for level in ("global", "tensor"):
        opt = trained(None, max_norm=1.0, telemetry=level)
        for suffix in ("png", "svg"):
            opt.plot(tmp_path / f"{level}.{suffix}")
        assert (tmp_path / f"{level}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert "<svg" in (tmp_path / f"{level}.svg").read_text()


def test_a_plot_of_little_or_bad_steps_is_drawn(tmp_path: Path) -> None:
    param = nn.Parameter(torch.zeros(3))
    opt = sg.optim.SGD([param], lr=0.1, telemetry="tensor")
    with pytest.raises(ValueError, match="plot: expected at least one recorded step, got none"):
        opt.plot(tmp_path / "none.png")
    for value in (0.0, math.nan, math.inf, 1e-30, 1e30):
        param.grad = torch.full_like(param, value)
        opt.step()
        opt.plot(tmp_path / "few.png")
    assert "not finite" in str(opt.report())


def rows(norms: list[list[float]]) -> History:
    """Return a history with these norms of parameters."""
    values = np.zeros((len(norms), TOTALS + 2 * len(norms[0])))
    values[:, TOTALS : TOTALS + len(norms[0])] = norms
    values[:, TOTALS + len(norms[0]) :] = ~np.isfinite(norms)
    values[:, NORM] = np.linalg.norm(np.nan_to_num(norms), axis=1)
    return History(100, values, tuple("abcdefgh"[: len(norms[0])]))


def test_what_counts_as_an_explosion() -> None:
    steady, spike, rise = [1.0] * 30, [1.0] * 30, [1.0] * 10 + [30.0] * 20
    spike[8] = 11.0
    nan_at_first = [math.nan, *[1.0] * 29]
    history = rows([list(row) for row in zip(steady, spike, rise, nan_at_first, strict=True)])
    found = [(e.step, e.name) for e in Report(history).explosions]
    assert (100, "d") in found and (108, "b") in found
    assert {name for _, name in found} == {"b", "c", "d"}
    # A lasting rise becomes the usual norm.
    assert [step for step, name in found if name == "c"] == list(range(110, 115))


def test_a_step_of_almost_no_gradient_makes_no_others_explode() -> None:
    norms = [1.0] * 30
    norms[10] = 1e-30
    assert Report(rows([[norm] for norm in norms])).explosions == []


def test_a_gradient_that_comes_back_has_not_exploded() -> None:
    vanished = [1e-6] * 20 + [1e-3] * 20
    assert Report(rows([[norm, 1.0] for norm in vanished])).explosions == []
    back = [1e-6] * 20 + [2.0] * 20
    assert Report(rows([[norm, 1.0] for norm in back])).explosions[0].name == "a"


def test_in_the_first_steps_only_a_hundredfold_rise_is_an_explosion() -> None:
    found = Report(rows([[1.0, 1.0], [90.0, 110.0], [1.0, 1.0]])).explosions
    assert [(e.step, e.name) for e in found] == [(101, "b")]


def test_a_run_that_explodes_from_the_start_is_told_from_there() -> None:
    report = Report(
        rows([[2.0, 1.0], [4e3, 9e3], [3e9, 8e10], [math.nan, math.nan], [math.nan, math.nan]])
    )
    assert [(e.step, e.name) for e in report.explosions[:6:2]] == [
        (101, "b"),
        (102, "b"),
        (103, "b"),
    ]
    (conclusion,) = report.conclusions
    start = (
        "the gradient of b exploded at step 101, and that of b was not finite at step 103. Load "
    )
    assert conclusion.startswith(start)


def test_an_explosion_long_before_is_not_where_it_began() -> None:
    report = Report(rows([[1.0]] * 10 + [[20.0]] + [[1.0]] * 30 + [[math.nan]]))
    assert [e.step for e in report.explosions] == [110, 141]
    assert report.conclusions[0].startswith("the gradient of a was not finite at step 141.")


def test_usual_norms_are_a_geometric_moving_average() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1, (40, 2)))
    norms[7, 0], norms[9, 1] = np.nan, 0.0
    found = usual_norms(norms)
    for column in range(2):
        average, known = 0.0, 0
        for step in range(40):
            if known == 0:
                assert np.isnan(found[step, column])
            else:
                assert math.isclose(found[step, column], math.exp(average), rel_tol=1e-12)
            value = norms[step, column]
            if not value > 0:
                continue
            fed = math.log(value)
            if known >= 5:
                fed = min(max(fed, average - math.log(10)), average + math.log(10))
            average += max(0.1, 1 / (known + 1)) * (fed - average)
            known += 1


def test_a_report_says_what_was_skipped_and_why() -> None:
    param = nn.Parameter(torch.zeros(2))
    opt = sg.optim.SGD(
        [param], lr=0.1, max_norm=1.0, skip=sg.SkipSpikes(window=6), telemetry="global"
    )
    assert str(opt.report()) == "no steps recorded yet"
    for step in range(12):
        param.grad = torch.full_like(param, {4: math.nan, 9: 1e5}.get(step, 0.5 + 0.01 * step))
        opt.step()
    report = opt.report()
    assert report.skipped_steps == [4, 9]
    assert "skipped   2 steps: 4, 9 (1 not finite, 1 spikes)" in str(report)
    assert "limit 1" in str(report)
    assert repr(report) == str(report)


def test_the_page_on_telemetry_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    code = snippets("telemetry.md")
    assert list(code) == ["Seeing what happened", "Writers"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code["Seeing what happened"], names)
    assert "steps 0 to 99, 4 parameters" in printed.getvalue()
    exec(code["Writers"], names)
    opt = names["opt"]
    opt.step()
    opt.flush_telemetry()
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"steps.png", "steps.csv", "steps.jsonl"}


def test_without_telemetry_there_is_nothing_to_report(tmp_path: Path) -> None:
    opt = sg.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, telemetry=None)
    assert opt.telemetry is None
    assert "recorded_steps" not in opt.param_groups[0]
    for call in (opt.report, opt.flush_telemetry, lambda: opt.plot(tmp_path / "plot.png")):
        with pytest.raises(RuntimeError, match="expected an optimizer with telemetry"):
            call()


@pytest.mark.parametrize("kind", ["AdamW", "subclass", "in-place"])
def test_a_report_after_the_fact(kind: str, backend: Backend) -> None:
    model = nn.Linear(2, 1).to(backend.device)
    opt = MAKERS[kind](model.named_parameters())
    for step in range(9):
        for param in model.parameters():
            param.grad = torch.full_like(param, 1e3 if step == 7 else 1.0)
        opt.step()
    assert {(e.step, e.name) for e in opt.report().explosions} == {(7, "weight"), (7, "bias")}


@pytest.mark.parametrize(
    ("settings", "parameters", "kept"),
    [
        ({}, 1, 1000),
        ({}, 247, 1000),
        ({}, 2000, 124),
        ({}, 50_000, 20),
        ({"level": "global"}, 50_000, 1000),
        ({"every": 300}, 2000, 300),
        ({"history": 3000}, 2000, 3000),
    ],
    ids=str,
)
def test_how_many_steps_the_ring_holds(settings: Any, parameters: int, kept: int) -> None:
    telemetry = sg.Telemetry(**settings)
    numbers = TOTALS + (2 * parameters if telemetry.level == "tensor" else 0)
    assert telemetry.steps_kept(8 * numbers) == kept
    recorder = Recorder(telemetry)
    groups = [{"params": [nn.Parameter(torch.zeros(1))] * parameters}]
    assert recorder.memory(groups, parameters, None).rows.shape == (kept, numbers)
    if parameters <= 12_000 and not settings:
        assert 8 * kept * numbers <= 4_000_000
