"""Real training with the parts of timm's loop: its optimizers, scaler, clipping, schedulers, averages, checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import steadygrad as sg
from tests.digit_training import ROUNDED, batches, loss_of, network
from tests.nn.vision_libraries import vision
from tests.snapshots import assert_same_tree

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS, UPDATES = 4, 8


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """Yield timm with everything that a training script imports of it, while the tests of this file run."""
    with vision("timm", "timm.models", "timm.optim", "timm.scheduler", "timm.utils") as found:
        yield found[0]


def plan(timm: Any, optimizer: Any, name: str = "cosine") -> Any:
    """Return one of timm's schedulers, stepped per update, with a warm-up."""
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched=name,
        num_epochs=EPOCHS,
        warmup_epochs=1,
        warmup_lr=1e-4,
        decay_epochs=1,
        decay_milestones=[2, 3],
        step_on_epochs=False,
        updates_per_epoch=UPDATES,
    )
    return scheduler


def train(
    optimizer: Any,
    model: Any,
    scheduler: Any,
    scaler: Any = None,
    first: int = 0,
    last: int = EPOCHS,
    average: Any = None,
    **clipping: Any,
) -> list[float]:
    """Run the inner loop of timm's train.py from one epoch to another."""
    losses = []
    for index in range(first * UPDATES, last * UPDATES):
        losses.append(train_one(optimizer, model, scheduler, index, scaler, **clipping))
        if average is not None:
            average.update(model, step=index)
    return losses


def train_one(
    optimizer: Any,
    model: Any,
    scheduler: Any,
    index: int,
    scaler: Any = None,
    spoiled: int | None = None,
    **clipping: Any,
) -> float:
    """Take one update and return its loss."""
    optimizer.zero_grad()
    found = loss_of(model, next(batches(1, skip=index)))
    loss = found * math.inf if index == spoiled else found
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler(loss, optimizer, parameters=model.parameters(), **clipping)
    if (index + 1) % UPDATES == 0:
        scheduler.step((index + 1) // UPDATES)
    scheduler.step_update(num_updates=index + 1)
    return found.item()


def fell(losses: list[float]) -> bool:
    return sum(losses[-UPDATES:]) < 0.9 * sum(losses[:UPDATES])


FUSED = ["adamw", "nesterov"]
IN_PLACE = ["lamb", "nadamw", "lion", "adopt", "madgrad"]


def wrapped(timm: Any, model: Any, name: str, **ours: Any) -> Any:
    rate = {"nesterov": 0.1, "lion": 0.01, "lamb": 0.1}.get(name, 0.02)
    inner = timm.optim.create_optimizer_v2(model, opt=name, lr=rate, weight_decay=0.01)
    return sg.Stabilizer(inner, **(ours or {"max_norm": 0.5}))


@pytest.mark.parametrize("name", [*FUSED, *IN_PLACE])
def test_its_optimizers(timm: Any, name: str) -> None:
    model, twin = network(), network()
    ours = wrapped(timm, model, name)
    theirs = wrapped(timm, twin, name).optimizer
    scaler = timm.utils.NativeScaler("cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = train(ours, model, plan(timm, ours))
    want = train(theirs, twin, plan(timm, theirs), scaler, clip_grad=0.5)
    assert fell(losses)
    assert losses == pytest.approx(want, rel=1e-2 if name == "lion" else 1e-3)
    assert ours.path.startswith("fused" if name in FUSED else "in-place")
    assert ours.clipped_steps > 0


@pytest.mark.parametrize("name", ["cosine", "tanh", "step", "multistep", "poly"])
def test_its_schedulers(timm: Any, name: str) -> None:
    model, twin = network(), network()
    ours, theirs = (wrapped(timm, net, "adamw") for net in (model, twin))
    schedulers = [plan(timm, ours, name), plan(timm, theirs.optimizer, name)]
    found: list[list[Any]] = [[], []]
    for update in range(1, EPOCHS * UPDATES + 1):
        for one, scheduler, rates in zip((ours, theirs), schedulers, found, strict=True):
            if update % UPDATES == 0:
                scheduler.step(update // UPDATES)
            scheduler.step_update(num_updates=update)
            rates.append([group["lr"] for group in one.param_groups])
    assert found[0] == found[1]
    assert len({rates[0] for rates in found[0]}) > 2


@pytest.mark.parametrize("mode", [None, "norm", "value", "agc"])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_its_scaler_and_clipping(timm: Any, name: str, mode: str | None) -> None:
    model = network()
    optimizer = wrapped(timm, model, name)
    scaler = timm.utils.NativeScaler("cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    clipping = {} if mode is None else {"clip_grad": 0.01, "clip_mode": mode}
    losses = train(optimizer, model, plan(timm, optimizer), scaler, spoiled=3, **clipping)
    assert optimizer.skipped_steps == 1 and scaler._scaler.get_scale() == 2.0**9
    norm = float(optimizer.grad_norm)
    if mode is None:
        assert fell(losses) and 0.01 < norm < 10
    elif mode == "norm":  # with a second clipper, ours sees gradients that were already clipped
        assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "lamb", *ROUNDED])
def test_resuming_from_its_checkpoint(timm: Any, tmp_path: Path, kind: str) -> None:
    logging.getLogger("timm").setLevel(logging.WARNING)

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network().bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(x.bfloat16())
            return logits

    def started() -> tuple[Any, Any, Any]:
        model = Half() if kind in ROUNDED else network()
        if kind in ROUNDED:
            optimizer = ROUNDED[kind](model.parameters())
        else:
            learning = {"clip": sg.ClipZScore(warmup=4), "skip": sg.SkipSpikes(window=8)}
            optimizer = wrapped(timm, model, kind, **learning)
        return optimizer, model, plan(timm, optimizer)

    straight = started()
    scaler = timm.utils.NativeScaler("cpu")
    train(*straight, scaler, 0, 2)
    saver = timm.utils.CheckpointSaver(
        straight[1], straight[0], amp_scaler=scaler, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(1, metric=0.5)
    losses = train(*straight, scaler, 2, 4)
    resumed, again = started(), timm.utils.NativeScaler("cpu")
    epoch = timm.models.resume_checkpoint(
        resumed[1], str(tmp_path / "last.pth.tar"), resumed[0], again
    )
    assert epoch == 2
    resumed[2].step_update(num_updates=2 * UPDATES)  # as train.py does
    assert train(*resumed, again, 2, 4) == losses
    assert_same_tree(resumed[1].state_dict(), straight[1].state_dict())
    assert_same_tree(resumed[0].state_dict(), straight[0].state_dict())
    assert_same_tree(again.state_dict(), scaler.state_dict())


def test_its_average_of_weights(timm: Any) -> None:
    model = network(norm=True)
    optimizer = wrapped(timm, model, "adamw")
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    train(optimizer, model, plan(timm, optimizer), average=average)
    want = network(norm=True)
    state = {name: value.clone() for name, value in want.state_dict().items()}
    other = wrapped(timm, want, "adamw")
    scheduler = plan(timm, other)
    for index in range(EPOCHS * UPDATES):
        train_one(other, want, scheduler, index)
        decay = 0.0 if index < 2 else 0.9  # the average begins with a copy
        for name, value in want.state_dict().items():
            if value.is_floating_point():
                state[name] = decay * state[name] + (1 - decay) * value
            else:
                state[name] = value.clone()
    torch.testing.assert_close(dict(average.module.state_dict()), state, rtol=1e-4, atol=1e-5)
    inputs, labels = next(batches(1, skip=99))
    assert float((average(inputs).argmax(1) == labels).double().mean()) > 0.5


def test_one_of_its_networks_with_our_batch_norm(timm: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    model = sg.nn.convert_batchnorm(model)
    fused = [
        entry for entry in str(sg.nn.conversion_report(model)).splitlines() if " fused " in entry
    ]
    assert len(fused) >= 8
    optimizer = sg.Stabilizer(
        timm.optim.create_optimizer_v2(model, opt="adamw", lr=2e-3), clip=sg.ClipZScore(warmup=4)
    )
    losses = []
    for pixels, labels in batches(24):
        images = functional.interpolate(pixels.view(-1, 1, 8, 8), scale_factor=2)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images[:32]), labels[:32])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
