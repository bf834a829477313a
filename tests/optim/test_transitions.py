"""What changes during a step or between wrappers: hooks, closures, checkpoints, amp attributes."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

import steadygrad as sg
from tests.optim import unfused


class Marked(Parameter):
    """A subclass of Parameter, which is not fused."""


def test_a_stabilized_class_unscales_once_in_place() -> None:
    param = Marked(torch.ones(3))
    optimizer = sg.optim.SGD([param], lr=0.1, fused=True, max_norm=1e9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((param * 2.0).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.path.startswith("in-place: ")
    torch.testing.assert_close(param.detach().as_subclass(Tensor), torch.full((3,), 0.8))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adagrad])
def test_gradients_that_a_closure_makes_sparse(rule: Any) -> None:
    def run(wrap: bool) -> tuple[list[float], Tensor]:
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=True)
        plain = rule(table.parameters(), lr=0.1)
        optimizer = sg.Stabilizer(plain, max_norm=1e9) if wrap else plain

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = table(torch.tensor([1, 1, 4])).square().sum()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
        return losses, table.weight.detach()

    losses, weight = run(wrap=True)
    expected_losses, expected = run(wrap=False)
    assert losses == pytest.approx(expected_losses)
    torch.testing.assert_close(weight, expected)


def test_the_loss_of_a_closure_survives_a_skip_on_the_way_in_place() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = sg.Stabilizer(torch.optim.SGD(table.parameters(), lr=0.1), max_norm=1.0)

    def closure() -> float:
        (table(torch.tensor([1])).sum() * float("nan")).backward()
        return 5.0

    assert optimizer.step(closure) == 5.0
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("everywhere", [False, True], ids=["own", "global"])
def test_a_pre_hook_may_clear_state_load_state_and_add_groups(everywhere: bool) -> None:
    def run(wrap: bool) -> list[Tensor]:
        torch.manual_seed(1)
        params = [Parameter(torch.randn(4)) for _ in range(3)]
        plain = torch.optim.AdamW(params[:2], lr=0.1)
        optimizer = sg.Stabilizer(plain, max_norm=1e9) if wrap else plain
        saved: dict[str, Any] = {}

        def hook(hooked: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if hooked is not plain:
                return
            if taken == 2:
                hooked.state.clear()
            if taken == 4:
                hooked.load_state_dict(saved)
            if taken == 3:
                hooked.param_groups[0]["lr"] = 0.2
            if taken == 5:
                hooked.add_param_group({"params": [params[2]]})

        register = register_optimizer_step_pre_hook if everywhere else plain.register_step_pre_hook
        handle = register(hook)
        for taken in range(7):
            for param in params:
                param.grad = torch.randn(4)
            if taken == 3:
                saved = plain.state_dict()
            optimizer.step()
        handle.remove()
        return [*params, *(plain.state[param]["step"] for param in params)]

    for one, other in zip(run(wrap=True), run(wrap=False), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rule", [torch.optim.SGD, unfused.Adamax])
def test_a_closure_may_change_limits_and_add_groups(rule: Any) -> None:
    params = [Parameter(torch.zeros(2)), Parameter(torch.zeros(2))]
    optimizer = sg.Stabilizer(rule(params[:1], lr=1.0), max_norm=1e9)

    def closure() -> float:
        for param in params:
            param.grad = torch.tensor([3.0, 4.0])
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": params[1:]})
        for group in optimizer.param_groups:
            group["max_norm"] = 0.5
        return 2.0

    assert optimizer.step(closure) == 2.0
    assert optimizer.clipped_steps == 1
    assert all(bool((param != 0).all()) for param in params)


def test_creating_state_for_a_checkpoint_is_no_step() -> None:
    model = nn.Linear(3, 2)
    optimizer = sg.Stabilizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), max_norm=0.01, l2=0.1
    )
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.clipped_steps == 0 and optimizer.skipped_steps == 0
    assert not optimizer.has_stepped and optimizer.grad_norm.isnan()
    for state in optimizer.state.values():
        assert not bool(state["momentum_buffer"].any())


def test_lbfgs_counts_steps_not_evaluations() -> None:
    param = Parameter(torch.tensor([5.0, -3.0]))
    optimizer = sg.Stabilizer(torch.optim.LBFGS([param], max_iter=8), max_norm=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.clipped_steps == 1


def test_a_new_wrapper_follows_its_own_options() -> None:
    param = Parameter(torch.zeros(2))
    inner = torch.optim.SGD([param], lr=1.0)
    sg.Stabilizer(inner, max_norm=1.0)
    optimizer = sg.Stabilizer(inner, max_norm=0.1)
    param.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.06, -0.08]))


def test_a_load_hook_may_unpack_the_state_dict() -> None:
    param = Parameter(torch.zeros(2))
    optimizer = sg.Stabilizer(torch.optim.Adam([param]), max_norm=1.0)
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: saved["optimizer"])
    optimizer.load_state_dict({"optimizer": optimizer.state_dict()})
    assert optimizer.param_groups[0]["max_norm"] == 1.0


def test_a_second_thread_is_told_to_wait() -> None:
    params = [Parameter(torch.ones(20_000)) for _ in range(30)]
    optimizer = sg.optim.AdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    refusals: list[str] = []

    def work() -> None:
        for _ in range(50):
            try:
                optimizer.step()
            except RuntimeError as refusal:
                refusals.append(str(refusal))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("one step of an optimizer at a time" in refusal for refusal in refusals)
    optimizer.step()
    assert all(bool(torch.isfinite(param).all()) for param in params)


def test_threads_follow_torchs_setting() -> None:
    before = torch.get_num_threads()
    seen: list[object] = []

    def work() -> None:
        sg.get_total_norm([torch.ones(3)])
        seen.append(sg._kernels.build_info()["max_threads"])

    torch.set_num_threads(1)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


@pytest.mark.parametrize("wrap", [True, False])
def test_an_optimizer_that_its_parameter_refers_to_is_collected(wrap: bool) -> None:
    param = Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer: torch.optim.Optimizer = (
        sg.Stabilizer(torch.optim.AdamW([param])) if wrap else sg.optim.AdamW([param])
    )
    optimizer.step()
    param.optimizer = optimizer  # type: ignore[attr-defined]
    alive = weakref.ref(param)
    del param, optimizer
    gc.collect()
    assert alive() is None


def test_parameters_that_share_memory_go_in_place() -> None:
    memory = torch.ones(4)
    params = [Parameter(memory), Parameter(memory)]
    optimizer = sg.Stabilizer(torch.optim.SGD(params, lr=0.1), max_norm=1.0)
    assert "share memory" in optimizer.path


def test_an_expanded_state_is_refused() -> None:
    param = Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = sg.Stabilizer(torch.optim.Adam([param]), max_norm=1.0)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(1).expand(5)
    with pytest.raises(ValueError, match="expanded"):
        optimizer.step()
