"""What is refused around optimizers without a fused rule; a refused step changes nothing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.optim.in_place import other_update_methods
from tests.backends import Backend
from tests.optim import unfused
from tests.snapshots import Snapshot

NAN = math.nan


def stepped(backend: Backend, rule: str, **options: Any) -> sg.Stabilizer:
    """Return an optimizer after its first step, with a gradient that the next step would clip."""
    param = Parameter(torch.ones(3, device=backend.device))
    optimizer = sg.Stabilizer(
        unfused.optimizer_class(rule)([param], lr=0.1), max_norm=0.1, **options
    )
    param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    param.grad = torch.full_like(param, 0.5)
    return optimizer


@pytest.mark.parametrize("l1", [0.0, 0.1])
@pytest.mark.parametrize(
    ("rule", "key", "value", "error"),
    [
        ("Adadelta", "lr", NAN, ValueError),
        ("Adadelta", "lr", -0.1, ValueError),
        ("Adadelta", "lr", None, TypeError),
        ("Rprop", "lr", math.inf, ValueError),
        ("Adamax", "eps", NAN, ValueError),
        ("NAdam", "betas", (0.9, NAN), ValueError),
        ("ASGD", "lambd", NAN, ValueError),
    ],
)
def test_bad_numbers_are_refused_before_anything_changes(
    backend: Backend, rule: str, key: str, value: Any, error: type[Exception], l1: float
) -> None:
    optimizer = stepped(backend, rule, l1=l1, l1_mode="proximal")
    optimizer.param_groups[0][key] = value
    before = Snapshot(optimizer.param_groups[0]["params"], optimizer)
    with pytest.raises(error, match=rf"step: param_groups\[0\]: {key}: expected a .*number"):
        optimizer.step()
    before.assert_unchanged()


def test_a_rate_that_an_optimizer_finds_by_itself_is_none() -> None:
    class FindsItsRate(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.defaults["lr"] = self.param_groups[0]["lr"] = None

        def step(self, closure: Any = None) -> None:
            pass

    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = sg.Stabilizer(FindsItsRate([param]), max_norm=1.0)
    optimizer.step()
    assert optimizer.clipped_steps == 1
    optimizer = sg.Stabilizer(FindsItsRate([param]), l1=0.1, l1_mode="proximal")
    with pytest.raises(TypeError, match="lr: expected a finite number >= 0, got None"):
        optimizer.step()


def test_the_proximal_step_of_complex_parameters_shrinks_their_magnitudes(backend: Backend) -> None:
    values = torch.tensor([3 + 4j, 0.03 + 0.04j, 0], device=backend.device)
    param = Parameter(values)
    param.grad = torch.zeros_like(param)
    optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=1.0), l1=0.5, l1_mode="proximal")
    optimizer.step()
    assert optimizer.path == "in-place: complex parameters"
    expected = torch.tensor([2.7 + 3.6j, 0, 0], device=backend.device)
    torch.testing.assert_close(param.detach(), expected)


def test_an_error_in_the_middle_of_lbfgs_takes_its_moves_back() -> None:
    param = Parameter(torch.ones(3))
    optimizer = sg.Stabilizer(torch.optim.LBFGS([param], lr=0.1), max_norm=100.0)
    evaluations = itertools.count()

    def closure() -> torch.Tensor:
        if next(evaluations) == 2:
            raise KeyError("no batch left")
        optimizer.zero_grad()
        loss = (param**4).sum()
        loss.backward()
        return loss

    with pytest.raises(KeyError, match="no batch left"):
        optimizer.step(closure)
    assert torch.equal(param, torch.ones(3)) and not optimizer.state


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021), with the methods of the implementation in common use."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                move = group["rho"] * param.grad / param.grad.norm()
                param.add_(move)
                self.state[param]["move"] = move

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(self.state[param]["move"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        assert closure is not None, "SAM needs a closure"
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def test_update_methods_beside_step_are_refused_by_name() -> None:
    param = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"got SAM, which has first_step, second_step too"):
        sg.Stabilizer(SAM([param], torch.optim.SGD, lr=1.0), max_norm=0.001)


def test_the_line_that_the_refusal_says_clips_what_sam_updates() -> None:
    param = Parameter(torch.ones(3))
    optimizer = SAM(
        [param], sg.optim.SGD, lr=1.0, max_norm=0.001, clip_scope="tensor", telemetry="global"
    )

    def closure() -> None:
        param.grad = torch.full((3,), 100.0)

    closure()
    optimizer.step(closure)
    assert (param.detach() - 1).norm() == pytest.approx(0.001, rel=1e-3)
    # Options that are not keys of a param group do not stay in one.
    assert not {"telemetry", "clip_scope"} & set(optimizer.param_groups[0])


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    ],
)
def test_no_optimizer_of_torch_has_other_update_methods(kind: Any) -> None:
    assert other_update_methods(object.__new__(kind)) == []


def test_a_method_that_needs_arguments_is_a_part_of_the_step() -> None:
    class OfOneParameter(torch.optim.SGD):
        def update_step(self, group: Any, param: Any) -> None:
            pass

        step_was_skipped = property(lambda self: False)

    assert sg.Stabilizer(OfOneParameter([Parameter(torch.ones(3))])).path.startswith("in-place")
