"""Checks that tensors which torch negates lazily give the right sign, or are refused in words and left unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import Backend
from tests.optim import unfused
from tests.optim.parameter_sets import with_gradients
from tests.snapshots import Snapshot, bits
from tests.tolerances import assert_close

REFUSALS = (TypeError, ValueError, RuntimeError)


def test_lazily_negated_and_conjugated_gradients(backend: Backend) -> None:
    def lazy() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(3, 50, 2, generator=generator).to(backend.device)
        return [torch.view_as_complex(values[0]).conj().imag, *values[1:, :, 0]]

    assert lazy()[0].is_neg()
    calls: list[Callable[[list[Parameter]], object]] = [
        lambda ps: sg.clip_grad_norm_(ps, 1.0),
        lambda ps: sg.clip_grad_value_(ps, 0.5),
        lambda ps: sg.add_penalty_(ps, 0.5, 0.5),
        lambda ps: sg.Stabilizer(torch.optim.SGD(ps, lr=0.5), max_norm=1.0).step(),
        lambda ps: sg.Stabilizer(unfused.Adadelta(ps, lr=0.5), max_norm=1.0).step(),
    ]
    for call in calls:
        mine, plain = with_gradients(lazy()), with_gradients([g.clone() for g in lazy()])
        for params in (mine, plain):
            with torch.no_grad():
                for param in params:
                    param.add_(1.0)
        snapshot = Snapshot(mine)
        call(plain)
        try:
            call(mine)
        except REFUSALS as refusal:
            assert "neg" in str(refusal).lower()
            snapshot.assert_unchanged()
        else:
            for one, other in zip(mine, plain, strict=True):
                assert one.grad is not None and other.grad is not None
                assert_close(one, other, torch.float32)
                assert_close(one.grad, other.grad, torch.float32)
    assert_close(
        sg.get_total_norm(lazy()), sg.get_total_norm([g.clone() for g in lazy()]), torch.float32
    )


def negative_view(values: Tensor) -> Tensor:
    """Return a contiguous tensor of these values, whose memory holds them with the opposite sign."""
    view: Tensor = torch._neg_view(values.detach().neg())
    assert view.is_neg() and view.is_contiguous() and torch.equal(view, values)
    return view


@pytest.mark.parametrize("operand", ["parameter", "gradient", "state", "step"])
@pytest.mark.parametrize("write_grads", [False, True])
def test_contiguous_negative_views_in_a_step(
    backend: Backend, operand: str, write_grads: bool
) -> None:
    def build(view: Callable[[Tensor], Tensor]) -> tuple[Parameter, sg.Stabilizer]:
        values = torch.tensor([1.0, -2.0, 3.0], device=backend.device)
        param = Parameter(view(values) if operand == "parameter" else values)
        options = {"max_norm": 2.0, "l2": 0.5, "write_grads": write_grads}
        optimizer = sg.Stabilizer(torch.optim.AdamW([param], lr=0.5), **options)
        held = values.clone()
        optimizer.state[param] = {
            "step": torch.tensor(4.0, device=backend.device if backend.asynchronous else "cpu"),
            "exp_avg": held.clone(),
            "exp_avg_sq": held.square(),
        }
        grad = torch.tensor([3.0, 4.0, -12.0], device=backend.device)
        param.grad = view(grad) if operand == "gradient" else grad
        replaced = {"state": "exp_avg", "step": "step"}.get(operand)
        if replaced is not None:
            optimizer.state[param][replaced] = view(optimizer.state[param][replaced])
        return param, optimizer

    (mine, ours), (plain, theirs) = build(negative_view), build(Tensor.clone)
    snapshot = Snapshot([mine], ours)
    theirs.step()
    if operand == "gradient" and not write_grads:
        ours.step()
        assert torch.equal(bits(mine), bits(plain))
        return
    with pytest.raises(TypeError, match=r"resolve_neg\(\)"):
        ours.step()
    snapshot.assert_unchanged()


@pytest.mark.parametrize("operand", ["parameter", "exp_avg", "step"])
def test_memory_that_becomes_a_negative_view_between_steps(backend: Backend, operand: str) -> None:
    param = Parameter(torch.tensor([1.0, -2.0, 3.0], device=backend.device))
    optimizer = sg.Stabilizer(torch.optim.AdamW([param], lr=0.5), max_norm=2.0)
    param.grad = torch.tensor([3.0, 4.0, -12.0], device=backend.device)
    for _ in range(2):
        optimizer.step()
    optimizer.state_dict()  # On a device, state is entered when somebody asks for it.
    exchanged = param if operand == "parameter" else optimizer.state[param][operand]
    exchanged.data = negative_view(exchanged)
    snapshot = Snapshot([param], optimizer)
    with pytest.raises(TypeError, match=r"resolve_neg\(\)"):
        optimizer.step()
    snapshot.assert_unchanged()
    exchanged.data = exchanged.data.resolve_neg()
    optimizer.step()


@pytest.mark.parametrize("size", [1, 3])
def test_the_imaginary_part_of_a_conjugate_replaces_that_of_the_tensor(
    backend: Backend, size: int
) -> None:
    values = torch.zeros(size, dtype=torch.complex64, device=backend.device)
    param = Parameter(values.imag)
    optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=0.1), max_norm=10.0)
    param.grad = torch.ones(size, device=backend.device)
    optimizer.step()
    param.data = values.conj().imag  # the same memory, read with the opposite sign
    before = param.detach().clone()
    with pytest.raises(TypeError, match=r"resolve_neg\(\)"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_contiguous_negative_views_in_functions(backend: Backend) -> None:
    values = torch.tensor([0.5, -2.0, 3.0], device=backend.device)

    def both(call: Callable[[Tensor], object]) -> None:
        mine, plain = negative_view(values), values.clone()
        call(mine)
        call(plain)
        assert torch.equal(mine, plain)

    def with_grad(grad: Tensor) -> list[Tensor]:
        holder = torch.ones(3, device=backend.device)
        holder.grad = grad
        return [holder]

    both(lambda t: sg.clip_grad_norm_(with_grad(t), 1.0))
    both(lambda t: sg.clip_grads_with_norm_(with_grad(t), 1.0, 5.0))
    both(lambda t: sg.clip_grad_value_(with_grad(t), 1.0))
    both(lambda t: sg.soft_threshold_([t], 1.0))
    grads = []
    for param in (negative_view(values), values.clone()):
        param.grad = torch.zeros(3, device=backend.device)
        assert sg.add_penalty_([param], 0.5, 1.0).item() == 0.5 * 5.5 + 0.5 * 13.25
        grads.append(param.grad)
    assert torch.equal(*grads)
    with pytest.raises(TypeError, match=r"add_penalty_: params\[0\].grad: .*resolve_neg"):
        sg.add_penalty_(with_grad(negative_view(values)), 0.5, 1.0)
    activations = [negative_view(values).requires_grad_(), values.clone().requires_grad_()]
    for activation in activations:
        sg.nn.ActivationPenalty(0.5, 1.0)(activation).sum().backward()
    assert torch.equal(*[a.grad for a in activations])  # type: ignore[arg-type]


def test_negative_views_in_batch_norm(backend: Backend) -> None:
    values = torch.randn(6, 4, 5, 5).to(backend.device)
    for place in ("input", "weight", "residual"):
        results = []
        for view in (negative_view, Tensor.clone):
            given = {"input": values, "weight": values[0, :, 0, 0], "residual": values.flip(0)}
            given[place] = view(given[place].contiguous())
            try:
                results.append(
                    sg.nn.functional.batch_norm(
                        given["input"],
                        None,
                        None,
                        given["weight"],
                        torch.zeros(4, device=backend.device),
                        training=True,
                        residual=given["residual"],
                    )
                )
            except TypeError as refusal:
                assert "resolve_neg" in str(refusal)
        assert len(results) < 2 or torch.equal(*results)
