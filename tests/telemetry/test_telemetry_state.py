"""Step numbers go on in a resumed run; names and the hard stop are kept, too."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import steadygrad as sg
from tests.backends import Backend


def made(backend: Backend, **options: Any) -> tuple[nn.Parameter, Any]:
    param = nn.Parameter(torch.zeros(2, device=backend.device))
    options = {"max_norm": 1.0, "telemetry": "global", **options}
    return param, sg.Stabilizer(torch.optim.SGD([param], lr=0.1), **options)


def step(param: nn.Parameter, opt: Any, *values: float) -> None:
    for value in values:
        param.grad = torch.full_like(param, value)
        opt.step()


def steps(opt: Any) -> list[int]:
    numbers: list[int] = opt.report().history.step.tolist()
    return numbers


def test_a_resumed_run_goes_on_counting(backend: Backend) -> None:
    param, opt = made(backend)
    step(param, opt, 1.0, math.nan, 1.0)
    saved = opt.state_dict()
    assert saved["param_groups"][0]["recorded_steps"] == 3
    other_param, other = made(backend)
    step(other_param, other, 1.0)
    other.load_state_dict(saved)
    step(other_param, other, 1.0, 1.0)
    assert steps(other) == [3, 4]
    step(param, opt, 1.0)
    assert steps(opt) == [0, 1, 2, 3]
    # After going back, what came after the checkpoint is forgotten.
    opt.load_state_dict(saved)
    step(param, opt, 1.0)
    assert steps(opt) == [3]
    # torch's own optimizer loads the state dict.
    torch.optim.SGD([nn.Parameter(torch.zeros(2, device=backend.device))], lr=0.1).load_state_dict(
        opt.state_dict()
    )


def test_other_checkpoints_leave_the_count_alone(backend: Backend) -> None:
    param, opt = made(backend)
    step(param, opt, 1.0, 1.0)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(2, device=backend.device))], lr=0.1)
    opt.load_state_dict(plain.state_dict())
    step(param, opt, 1.0)
    assert steps(opt)[-1] == 2
    # An optimizer without telemetry raises no error of its own.
    _, silent = made(backend, telemetry=None)
    silent.load_state_dict(opt.state_dict())
    assert silent.telemetry is None


def test_copies_go_on_counting(backend: Backend) -> None:
    param, opt = made(backend)
    step(param, opt, 1.0, 1.0)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        step(other.param_groups[0]["params"][0], other, 1.0)
        assert steps(other) == [2]
    # Another wrapper of the same optimizer continues from this one's record.
    again = sg.Stabilizer(opt.optimizer, telemetry="tensor")
    step(param, again, 1.0)
    assert steps(again) == [2]


def test_new_parameters_begin_new_columns(backend: Backend) -> None:
    param, opt = made(backend, telemetry="tensor")
    step(param, opt, 1.0, 1.0)
    late = nn.Parameter(torch.zeros(3, device=backend.device))
    opt.add_param_group({"params": [late]})
    late.grad = torch.ones_like(late)
    step(param, opt, 1.0)
    history = opt.report().history
    assert history.step.tolist() == [2] and history.tensor_norms.shape == (1, 2)
    assert history.names == ("param_groups[0]['params'][0]", "param_groups[1]['params'][0]")


def test_names(backend: Backend) -> None:
    model = nn.Linear(2, 3).to(backend.device)
    opt = sg.optim.SGD(model.parameters(), lr=0.1, telemetry="tensor", nonfinite="raise")
    others = nn.Linear(2, 3).to(backend.device)
    with pytest.raises(ValueError, match=r"of the optimizer's 2 parameters, got none for 2: param"):
        opt.name_parameters(others.named_parameters())
    assert "param_names" not in opt.param_groups[0]
    whole = nn.ModuleDict({"head": model, "frozen": others})
    opt.name_parameters(whole.named_parameters())
    assert opt.param_groups[0]["param_names"] == ["head.weight", "head.bias"]
    for param in model.parameters():
        param.grad = torch.full_like(param, math.nan)
    with pytest.raises(sg.NonfiniteGradientError, match=r"head\.weight \(6\), head\.bias \(3\)"):
        opt.step()
    assert opt.report().history.names == ("head.weight", "head.bias")


def test_too_many_skipped_steps_stop_the_training(backend: Backend) -> None:
    records: list[sg.StepRecord] = []
    telemetry = sg.Telemetry(stop_after_skips=3, every=1, writers=[records.append])
    param, opt = made(backend, telemetry=telemetry)
    step(param, opt, 1.0, math.nan, math.nan, 1.0, math.nan, math.nan)
    before = param.detach().clone()
    with pytest.raises(sg.TooManySkippedSteps, match="skipped   5 steps: 1, 2, 4, 5, 6") as caught:
        step(param, opt, math.nan)
    assert caught.value.report.skipped_steps == [1, 2, 4, 5, 6]
    assert torch.equal(param, before) and opt.skipped_steps == 5
    assert [record.step for record in records] == list(range(7))
    step(param, opt, 1.0, math.nan)  # training can go on
    assert not torch.equal(param, before)


@pytest.mark.parametrize("told", [True, False])
def test_the_state_creation_step_is_none(backend: Backend, told: bool) -> None:
    records: list[sg.StepRecord] = []
    writers = [records.append] if told else []
    param, opt = made(backend, telemetry=sg.Telemetry("tensor", writers=writers))
    param.grad = torch.zeros_like(param)
    lr = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = 0.0
    opt.step()  # torch.distributed.checkpoint makes state with such a step
    opt.param_groups[0]["lr"] = lr
    step(param, opt, 1.0)
    # A device that nothing waits for cannot tell that the gradients were zero.
    assert steps(opt) == ([0, 1] if backend.asynchronous and not told else [0])
