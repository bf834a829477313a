"""torch's own companions of an optimizer: every scheduler, averaged weights, and a resumed run."""

from __future__ import annotations

import copy
import inspect
import io
import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import steadygrad as sg
from tests.digit_training import OPTIMIZERS, ROUNDED, batches, digits, loss_of, network
from tests.optim.lr_schedules import SCHEDULERS, advance
from tests.snapshots import assert_same_tree

pytestmark = pytest.mark.usefixtures("one_thread")
ABSTRACT = {"LRScheduler", "_LRScheduler"}


def train(
    model: Any, optimizer: Any, scheduler: Any = None, steps: int = 12, skip: int = 0
) -> list[float]:
    """Return the losses of ``steps`` steps."""
    losses = []
    for batch in batches(steps, skip):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def test_no_class_of_torch_is_left_out() -> None:
    classes = {
        name
        for name, found in vars(lr_scheduler).items()
        if inspect.isclass(found)
        and (issubclass(found, lr_scheduler.LRScheduler) or name == "ReduceLROnPlateau")
        and not issubclass(found, sg.LRBackoff)
    }
    assert classes - ABSTRACT == set(SCHEDULERS)


# torch's SequentialLR passes its schedulers an epoch, of which they warn.
@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["max_norm", "policies", "in-place"])
def test_every_scheduler_gives_the_rates_of_the_plain_optimizer(kind: str, name: str) -> None:
    model, twin = network(), network()
    ours = OPTIMIZERS[kind](model.parameters())
    plain = type(ours.optimizer)(twin.parameters(), **{"lr": ours.param_groups[0]["lr"]})
    if kind == "policies":
        plain.param_groups[0]["momentum"] = 0.9
    schedulers = [SCHEDULERS[name](ours), SCHEDULERS[name](plain)]
    for batch in batches(11):
        for net, optimizer, scheduler in zip((model, twin), (ours, plain), schedulers, strict=True):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()
            advance(name, scheduler)
        for key in ("lr", "initial_lr", "max_lr", "betas", "momentum"):
            assert ours.param_groups[0].get(key) == plain.param_groups[0].get(key), key
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    saved = [scheduler.state_dict() for scheduler in schedulers]
    if name not in ("SequentialLR", "ChainedScheduler", "LambdaLR", "MultiplicativeLR", "CyclicLR"):
        assert_same_tree(*saved)


@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_backoff_over_every_scheduler(name: str) -> None:
    model, twin = network(), network()
    optimizer, same = (OPTIMIZERS["max_norm"](net.parameters()) for net in (model, twin))
    alone = SCHEDULERS[name](same)
    over = sg.LRBackoff(optimizer, SCHEDULERS[name](optimizer), recovery_steps=4)
    multipliers = [1, 1, 0.5, 0.625, 0.75, 0.875, 1, 1]
    for index, (batch, multiplier) in enumerate(zip(batches(8), multipliers, strict=True)):
        for net, stepped in ((model, optimizer), (twin, same)):
            stepped.zero_grad()
            (loss_of(net, batch) * (math.nan if index == 2 else 1)).backward()
            stepped.step()
        advance(name, over)
        advance(name, alone)
        expected = multiplier * same.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("kind", [*OPTIMIZERS, *ROUNDED])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(kind: str) -> None:
    def started() -> tuple[Any, Any, Any]:
        model = network()
        if kind in ROUNDED:
            model.bfloat16()
        make = ROUNDED.get(kind) or OPTIMIZERS[kind]
        optimizer = make(model.parameters())
        inner = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=61)
        return model, optimizer, sg.LRBackoff(optimizer, inner)

    def run(parts: tuple[Any, Any, Any], steps: int, skip: int = 0) -> list[float]:
        model, *others = parts
        inputs = copy.copy(model)
        if kind in ROUNDED:
            inputs = torch.nn.Sequential(_ToHalf(), model)
        return train(inputs, *others, steps=steps, skip=skip)

    straight = started()
    losses = run(straight, 60)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    interrupted = started()
    run(interrupted, 30)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in interrupted], file)
    file.seek(0)
    resumed = started()
    for part, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    run(resumed, 30, skip=30)
    for got, want in zip(resumed, straight, strict=True):
        assert_same_tree(got.state_dict(), want.state_dict())
    assert resumed[1].param_groups[0]["lr"] != 0.01


class _ToHalf(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()


def accuracy(model: torch.nn.Module) -> float:
    inputs, labels = digits()
    model.eval()
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).double().mean())


def test_averaged_weights_with_our_batch_norm() -> None:
    model = network(norm=True)
    optimizer = OPTIMIZERS["max_norm"](model.parameters())
    averaged = AveragedModel(model)
    annealing = SWALR(optimizer, swa_lr=0.002, anneal_epochs=5, anneal_strategy="cos")
    kept = []
    for _ in range(6):
        train(model, optimizer, steps=20)
        annealing.step()
        averaged.update_parameters(model)
        kept.append(copy.deepcopy(model.state_dict()))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.002)
    want = torch.stack([state["0.weight"].double() for state in kept]).mean(0)
    torch.testing.assert_close(averaged.module[0].weight.double(), want, rtol=1e-5, atol=1e-6)
    update_bn(((batch, labels) for batch, labels in batches(20)), averaged)
    norm = averaged.module[1]
    assert isinstance(norm, sg.nn.BatchNorm1d) and int(norm.num_batches_tracked) == 20
    # update_bn leaves the mean of the batches' statistics, computed with the averaged weights.
    means = [averaged.module[0](batch).mean(0) for batch, _ in batches(20)]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert accuracy(averaged) > 0.9


def test_an_exponential_average() -> None:
    model = network(norm=True)
    optimizer = OPTIMIZERS["policies"](model.parameters())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    want = model[0].weight.detach().double().clone()
    for step, batch in enumerate(batches(60)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        averaged.update_parameters(model)
        weight = model[0].weight.detach().double()
        want = weight.clone() if step == 0 else 0.9 * want + 0.1 * weight
    torch.testing.assert_close(averaged.module[0].weight.double(), want, rtol=1e-4, atol=1e-5)
    assert accuracy(averaged) > 0.8
