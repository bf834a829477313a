"""Every optimizer without a fused rule, and every option that the fused step does not take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import steadygrad as sg
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.optimizer_runs import assert_same_params, assert_same_state
from tests.optim.parameter_sets import (
    assign_copies,
    dense_parameters,
    gradient_sequence,
    mixed_parameters,
)
from tests.snapshots import Snapshot, same_bits
from tests.tolerances import assert_close

DENSE: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{}, {"weight_decay": 0.01, "maximize": True, "rho": 0.8}],
    "Adafactor": [{}, {"weight_decay": 0.01, "maximize": True, "beta2_decay": -0.5}],
    "Adamax": [{}, {"weight_decay": 0.01, "maximize": True, "betas": (0.8, 0.9)}],
    "ASGD": [{}, {"lambd": 0.01, "t0": 3, "weight_decay": 0.01}],
    "NAdam": [{}, {"weight_decay": 0.01, "decoupled_weight_decay": True}],
    "RAdam": [{}, {"weight_decay": 0.01, "betas": (0.8, 0.9)}],
    "Rprop": [{}, {"etas": (0.6, 1.1), "maximize": True}],
}
COVERED = {"LBFGS", "Muon", "SparseAdam", "SGD", "Adam", "AdamW", "Adagrad", "RMSprop"}
CASES = [
    pytest.param(rule, options, id=f"{rule}-{index}")
    for rule, choices in DENSE.items()
    for index, options in enumerate(choices)
]


def without_empty(params: list[Parameter], rule: str) -> list[Parameter]:
    """Return the parameters that the optimizer itself accepts."""
    return [p for p in params if p.numel()] if rule == "Adafactor" else params


def test_every_optimizer_of_torch_is_tested() -> None:
    everything = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    assert everything - {"Optimizer"} == set(DENSE) | COVERED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_equals_torch_with_swapped_checkpoints(
    backend: Backend, rule: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    device = backend.device
    mine, theirs = (without_empty(mixed_parameters(dtype, device), rule) for _ in range(2))
    kind = unfused.optimizer_class(rule)
    ours = sg.Stabilizer(kind(mine, **options), max_norm=1.0)
    torchs = kind(theirs, **options)
    clipped = 0
    for step, gradients in enumerate(gradient_sequence(mine, 12)):
        assign_copies(mine, gradients)
        assign_copies(theirs, gradients)
        ours.step()
        norm = clip_grad_norm_([p for p in theirs if p.grad is not None], 1.0)
        torchs.step()
        clipped += bool(norm + 1e-6 > 1.0)
        assert ours.grad_norm is not None
        assert_close(ours.grad_norm, norm, dtype)
        # When torch loads float32 scalars beside float64 parameters, it casts them.
        if step == 6 and dtype == torch.float32:
            from_ours, from_torch = ours.state_dict(), torchs.state_dict()
            ours, torchs = sg.Stabilizer(kind(mine, **options), max_norm=1.0), kind(theirs)
            ours.load_state_dict(copy.deepcopy(from_torch))
            torchs.load_state_dict(copy.deepcopy(from_ours))
            # A plain torch checkpoint has no counters.
            assert ours.clipped_steps == 0
            clipped = 0
    assert_same_params(mine, theirs, dtype)
    assert_same_state(ours, torchs, dtype)
    assert ours.path.startswith("in-place: ") and len(ours.path) > len("in-place: ")
    assert ours.clipped_steps == clipped > 0


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch(backend: Backend, nesterov: bool) -> None:
    def build() -> list[Parameter]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(4, 8), (16, 5), (7, 7)]
        return [Parameter(torch.randn(s, generator=generator).to(backend.device)) for s in shapes]

    mine, theirs = build(), build()
    ours = sg.Stabilizer(torch.optim.Muon(mine, nesterov=nesterov), max_norm=1.0)
    torchs = torch.optim.Muon(theirs, nesterov=nesterov)
    for gradients in gradient_sequence(mine, 10, decades=2.0):
        assign_copies(mine, gradients)
        assign_copies(theirs, gradients)
        ours.step()
        clip_grad_norm_([p for p in theirs if p.grad is not None], 1.0)
        torchs.step()
    # The orthogonalization runs in bfloat16, so only the momentum shows the gradients closely.
    assert_same_state(ours, torchs, torch.float32)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=2.0**-8, atol=1e-4)
    assert ours.path.startswith("in-place: ")


def clip_sparse(params: list[Parameter], max_norm: float) -> float:
    """Clip coalesced sparse gradients; torch's own function does not take them."""
    values = []
    for param in params:
        assert param.grad is not None
        param.grad = param.grad.coalesce()
        values.append(param.grad.values())
    norm = torch.cat([v.reshape(-1) for v in values]).double().norm().item()
    for value in values:
        value.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


@pytest.mark.parametrize("rule", ["SparseAdam", "SGD", "Adagrad"])
def test_sparse_gradients_equal_torch(backend: Backend, rule: str) -> None:
    def build() -> list[Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [
            Parameter(torch.randn(9, width, generator=generator).to(backend.device))
            for width in (3, 4)
        ]

    mine, theirs = build(), build()
    kind = unfused.optimizer_class(rule)
    ours, torchs = sg.Stabilizer(kind(mine, lr=0.1), max_norm=1.0), kind(theirs, lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        for one, other in zip(mine, theirs, strict=True):
            # A row appears twice, and its gradient is the sum.
            rows = torch.randint(9, (4,), generator=generator)
            rows[3] = rows[0]
            values = torch.randn(4, one.shape[1], generator=generator) * 10.0 ** (step % 5 - 2)
            sparse = torch.sparse_coo_tensor(rows[None], values, one.shape, check_invariants=True)
            one.grad, other.grad = sparse.clone(), sparse.clone()
        # torch's Adagrad warns unless it is told whether to check its own sparse tensors.
        with torch.sparse.check_sparse_tensor_invariants():
            ours.step()
            norm = clip_sparse(theirs, 1.0)
            torchs.step()
        assert ours.grad_norm is not None
        assert ours.grad_norm.item() == pytest.approx(norm, rel=1e-6, abs=0.0)
    assert_same_params(mine, theirs, torch.float32)
    assert ours.path.startswith("in-place: ")
    assert "sparse" in ours.path.lower() or rule == "SparseAdam"


def test_sparse_non_finite_gradients_skip_the_step(backend: Backend) -> None:
    param = Parameter(torch.ones(5, 2, device=backend.device))
    ours = sg.Stabilizer(torch.optim.SparseAdam([param], lr=0.1), max_norm=1.0)
    bad = torch.tensor([[1.0, float("nan")]])
    param.grad = torch.sparse_coo_tensor(torch.tensor([[2]]), bad, (5, 2), check_invariants=True)
    ours.step()
    assert torch.equal(param.detach(), torch.ones(5, 2)) and ours.skipped_steps == 1
    assert not any(ours.state_dict()["state"].values())


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_clips_every_evaluation(backend: Backend, line_search: str | None) -> None:
    target = torch.linspace(-3, 3, 24, dtype=torch.float64, device=backend.device).view(4, 6)

    clipped: list[bool] = []

    def run(clip_inside: bool) -> tuple[Parameter, int, list[Any]]:
        param = Parameter(torch.zeros_like(target))
        wrapped: Any = torch.optim.LBFGS([param], lr=0.1, max_iter=4, line_search_fn=line_search)
        optimizer = wrapped if clip_inside else sg.Stabilizer(wrapped, max_norm=3.0)
        evaluations = 0

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = (1 + (param - target) ** 2).sqrt().sum()
            loss.backward()
            if clip_inside:
                clipped.append(bool(clip_grad_norm_([param], 3.0) > 3.0))
            return loss

        losses = [optimizer.step(closure) for _ in range(4)]
        if not clip_inside:
            assert optimizer.path.startswith("in-place: ")
        return param, evaluations, losses

    (mine, my_count, my_losses), (theirs, count, losses) = run(False), run(True)
    assert my_count == count
    assert any(clipped) and torch.isfinite(mine).all()
    # The curvature is a difference of gradients, which magnifies the last bit by some decades.
    assert_close(torch.stack(my_losses), torch.stack(losses), torch.float32)
    assert_close(mine, theirs, torch.float32)


@pytest.mark.parametrize("rule", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"])
def test_complex_parameters_go_in_place(backend: Backend, rule: str) -> None:
    def build() -> list[Parameter]:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(30, 2, generator=generator).to(backend.device)
        real = torch.randn(5, generator=generator).to(backend.device)
        return [Parameter(torch.view_as_complex(values)), Parameter(real)]

    mine, theirs = build(), build()
    kind = unfused.optimizer_class(rule)
    ours, torchs = sg.Stabilizer(kind(mine, lr=0.01), max_norm=1.0), kind(theirs, lr=0.01)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator, dtype=one.dtype) * 10.0**step
            one.grad = one.grad.to(backend.device)
            other.grad = one.grad.clone()
        ours.step()
        clip_grad_norm_(theirs, 1.0)
        torchs.step()
    for one, other in zip(mine, theirs, strict=True):
        real = [torch.view_as_real(p) if p.is_complex() else p for p in (one, other)]
        assert_close(*real, torch.float32)
    assert ours.path.startswith("in-place: ") and "complex" in ours.path


def test_differentiable_goes_in_place(backend: Backend) -> None:
    leaf = torch.ones(5, device=backend.device, requires_grad=True)

    def run(wrap: bool) -> tuple[Any, Tensor | None]:
        leaf.grad = None
        weight = leaf.clone()
        weight.retain_grad()
        optimizer: Any = torch.optim.SGD([weight], lr=0.1, differentiable=True)
        if wrap:
            optimizer = sg.Stabilizer(optimizer, max_norm=1e6)
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
        (weight**2).sum().backward()
        return optimizer, leaf.grad

    _, want = run(wrap=False)
    optimizer, got = run(wrap=True)
    assert got is not None and want is not None
    assert_close(got, want, torch.float32)
    assert optimizer.path.startswith("in-place: ") and "differentiable" in optimizer.path


@pytest.mark.parametrize("rule", ["Adam", "AdamW", "RMSprop"])
def test_capturable_is_fused_where_steps_are_decided_on_the_device(
    backend: Backend, rule: str
) -> None:
    (param,) = (Parameter(torch.ones(3, device=backend.device)),)
    ours = sg.Stabilizer(unfused.optimizer_class(rule)([param], capturable=True), max_norm=1.0)
    param.grad = torch.ones_like(param)
    if backend.asynchronous:
        assert ours.path == "fused"
        ours.step()
        assert ours.state[param]["step"].device == param.device
        return
    assert ours.path.startswith("in-place: ") and "capturable" in ours.path
    with pytest.raises(AssertionError, match="capturable"):  # torch's own error comes through
        ours.step()


def test_a_subclass_with_its_own_step_is_not_taken_for_the_fused_rule(backend: Backend) -> None:
    class Doubled(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            return super().step()

    param = Parameter(torch.zeros(4, device=backend.device))
    param.grad = torch.ones_like(param)
    ours = sg.Stabilizer(Doubled([param], lr=0.25), max_norm=1.0)
    ours.step()
    assert_close(param, torch.full((4,), -0.25), torch.float32)
    assert ours.path.startswith("in-place: ")


@pytest.mark.parametrize("signature", ["step(self)", "step(self, closure=None)"])
def test_an_optimizer_that_evaluates_no_closure_is_clipped_too(
    backend: Backend, signature: str
) -> None:
    class Descent(torch.optim.Optimizer):
        def __init__(self, params: list[Parameter]) -> None:
            super().__init__(params, {"lr": 1.0})

        @torch.no_grad()
        def _update(self) -> None:
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad)

    if signature == "step(self)":
        Descent.step = lambda self: self._update()  # type: ignore[method-assign, assignment]
    else:
        Descent.step = lambda self, closure=None: self._update()  # type: ignore[method-assign]
    param = Parameter(torch.zeros(4, device=backend.device))
    optimizer = sg.Stabilizer(Descent([param]), max_norm=1.0)
    param.grad = torch.full_like(param, 100.0)
    optimizer.step()
    assert_close(param, torch.full((4,), -0.5), torch.float32)
    assert optimizer.clipped_steps == 1
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert_close(param, torch.full((4,), -0.5), torch.float32)
    assert optimizer.skipped_steps == 1

    def closure() -> float:
        param.grad = torch.full_like(param, 200.0)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert_close(param, torch.full((4,), -1.0), torch.float32)


@pytest.mark.parametrize("rule", ["Adadelta", "NAdam", "Rprop"])
def test_an_inactive_clip_leaves_the_gradients_alone(backend: Backend, rule: str) -> None:
    params = dense_parameters(device=backend.device)
    assign_copies(params, gradient_sequence(params, 1, decades=0)[0])
    before = [p.grad.clone() for p in params if p.grad is not None]
    ours = sg.Stabilizer(unfused.optimizer_class(rule)(params), max_norm=1e9)
    ours.step()
    for param, gradient in zip(params, before, strict=True):
        assert param.grad is not None and same_bits(param.grad, gradient)
    assert ours.clipped_steps == 0


@pytest.mark.parametrize("rule", ["Adadelta", "NAdam", "Adafactor"])
def test_a_skipped_step_changes_nothing(backend: Backend, rule: str) -> None:
    params = dense_parameters(device=backend.device)
    sequence = gradient_sequence(params, 2, decades=0)
    ours = sg.Stabilizer(unfused.optimizer_class(rule)(params), max_norm=1e-3)
    for warm in (False, True):
        assign_copies(params, sequence[warm])
        if warm:
            ours.step()
            assign_copies(params, sequence[warm])
        last = params[-1].grad
        assert last is not None
        last.view(-1)[-1] = float("inf")
        snapshot, skipped = Snapshot(params, ours, counters=False), ours.skipped_steps
        ours.step()
        snapshot.assert_unchanged()
        assert ours.skipped_steps == skipped + 1
