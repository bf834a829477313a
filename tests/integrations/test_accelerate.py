"""Real training with accelerate: its wrapper of the optimizer, accumulation, clipping, loss scale, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import steadygrad as sg
from tests.digit_training import BATCH, OPTIMIZERS, ROUNDED, dataset, loss_of, network
from tests.snapshots import assert_same_tree

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_state")
BATCHES = 8


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Reset accelerate's settings, which it keeps for the whole process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """A model, its optimizer and its scheduler, as accelerate returns them."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        model = network()
        self.half = kind in ROUNDED
        if self.half:
            model.bfloat16()
        self.ours = (ROUNDED.get(kind) or OPTIMIZERS[kind])(model.parameters())
        scheduler = lr_scheduler.CosineAnnealingLR(self.ours, T_max=100)
        batches = torch.utils.data.DataLoader(dataset(BATCHES), batch_size=BATCH)
        self.model, self.optimizer, self.scheduler, self.batches = self.accelerator.prepare(
            model, self.ours, scheduler, batches
        )

    def train(self, epochs: int, clip: float | None = None) -> list[float]:
        losses = []
        for _ in range(epochs):
            for inputs, labels in self.batches:
                with self.accelerator.accumulate(self.model):
                    given = inputs.bfloat16() if self.half else inputs
                    loss = loss_of(self.model, (given, labels))
                    self.accelerator.backward(loss)
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                losses.append(loss.item())
        return losses


def fell(losses: list[float]) -> bool:
    return sum(losses[-BATCHES:]) < 0.8 * sum(losses[:BATCHES])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_takes_the_steps_of_a_loop_without_it(kind: str) -> None:
    run = Run(kind)
    assert fell(run.train(4))
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    plain = torch.utils.data.DataLoader(dataset(BATCHES), batch_size=BATCH)
    for batch in [batch for _ in range(4) for batch in plain]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        scheduler.step()
    assert_same_tree(run.model.state_dict(), model.state_dict())
    assert_same_tree(run.optimizer.state_dict(), optimizer.state_dict())
    assert run.ours.path == optimizer.path
    assert run.scheduler.get_last_lr() == scheduler.get_last_lr()


def test_accumulated_gradients() -> None:
    run = Run("subclass", gradient_accumulation_steps=4)
    losses = run.train(8)
    assert fell(losses)
    model = network()
    optimizer = OPTIMIZERS["subclass"](model.parameters())
    plain = torch.utils.data.DataLoader(dataset(BATCHES), batch_size=BATCH)
    for index, batch in enumerate([batch for _ in range(8) for batch in plain], start=1):
        (loss_of(model, batch) / 4).backward()
        if index % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            group = optimizer.param_groups[0]
            group["lr"] = 0.005 * (1 + math.cos(math.pi * index / 4 / 100))
    want = [p.detach() for p in model.parameters()]
    torch.testing.assert_close([p.detach() for p in run.model.parameters()], want)


@pytest.mark.parametrize("kind", [*OPTIMIZERS, *ROUNDED])
def test_resuming_from_a_checkpoint(tmp_path: Path, kind: str) -> None:
    straight = Run(kind)
    straight.train(2)
    straight.accelerator.save_state(str(tmp_path))
    straight.train(2)
    resumed = Run(kind)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(2)
    assert_same_tree(resumed.model.state_dict(), straight.model.state_dict())
    assert_same_tree(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert_same_tree(resumed.scheduler.state_dict(), straight.scheduler.state_dict())


def test_bf16_mixed_precision() -> None:
    run = Run("subclass", mixed_precision="bf16")
    assert fell(run.train(5)) and run.ours.path == "fused"


def test_its_own_clipping_leaves_the_rest_to_ours() -> None:
    run = Run("max_norm")
    run.train(1, clip=0.01)
    assert float(run.ours.grad_norm) == pytest.approx(0.01, rel=1e-3)
    assert run.ours.clipped_steps == 0


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", ["max_norm", "subclass"])
def test_a_loss_scale(kind: str, ours: bool) -> None:
    # accelerate makes a scaler only for devices, so its wrapper is given one here.
    accelerate.Accelerator(cpu=True)
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = (sg.GradScaler if ours else torch.amp.GradScaler)("cpu", init_scale=2.0**10)
    plain = lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    scheduler = accelerate.scheduler.AcceleratedScheduler(plain, wrapped)
    norms = []
    for index, batch in enumerate(torch.utils.data.DataLoader(dataset(6), batch_size=BATCH)):
        loss = loss_of(model, batch)
        scaler.scale(loss * (math.inf if index == 2 else 1)).backward()
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
        norms.append(float(optimizer.grad_norm))
    assert optimizer.skipped_steps == 1 and scaler.get_scale() == 2.0**9
    assert max(norm for norm in norms if math.isfinite(norm)) < 10
    # The step decides itself, so accelerate does not know that it was skipped, and its scheduler goes on.
    assert wrapped.step_was_skipped is False
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**6)
