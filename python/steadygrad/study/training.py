"""One training run, from a seed to a record of what happened."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .arms import Arm
from .data import Dataset
from .experiments import Experiment

_CURVE_POINTS = 160

# Three times the accuracy of guessing: with 10 classes and 1,000 test images .30, where guessing
# gives .10 with a standard deviation of .0095.
LEARNED_TIMES_CHANCE = 3.0


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm over a run, thinned to points about evenly spaced in log(step).

    Attributes:
        step: number of the last step that a point stands for; the first step is 1.
        loss: mean batch loss of the steps since the previous point.
        grad_norm: largest gradient norm of those steps.
    """

    step: tuple[int, ...]
    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """What one run did.

    Attributes:
        arm: name of the remedy.
        learning_rate: of SGD.
        seed: of the weights and batches.
        steps: steps made; a run ends early once its parameters are not finite.
        start_loss: mean cross-entropy on the training part before the first step.
        final_loss: the same after the last step.
        peak_loss: largest batch loss that was not NaN.
        nonfinite_step: first step whose batch loss was not finite, None if there was none.
        test_accuracy: on the held-out part, None if an output was not finite.
        chance: accuracy of guessing.
        clipped_steps: steps at which the clip was active.
        max_grad_norm: largest gradient norm before clipping that was not NaN.
        seconds_per_step: median time of forward, backward and optimizer step.
        curve: thinned loss and gradient norm.
    """

    arm: str
    learning_rate: float
    seed: int
    steps: int
    start_loss: float
    final_loss: float
    peak_loss: float
    nonfinite_step: int | None
    test_accuracy: float | None
    chance: float
    clipped_steps: int
    max_grad_norm: float
    seconds_per_step: float
    curve: Curve

    @property
    def survived(self) -> bool:
        """Whether the final loss is finite and below the loss at the start.

        A network that saturated at a loss above its start has not survived, though it is finite.
        """
        return math.isfinite(self.final_loss) and self.final_loss < self.start_loss

    @property
    def learned(self) -> bool:
        """Whether it survived with at least three times the test accuracy of guessing."""
        if self.test_accuracy is None:
            return False
        excess = self.test_accuracy - LEARNED_TIMES_CHANCE * self.chance
        return self.survived and excess > -1e-9  # .3 counts, though 3 * .1 is a little more


def train(
    experiment: Experiment,
    arm: Arm,
    learning_rate: float,
    seed: int,
    data: Dataset,
    on_step: Callable[[int, float], None] | None = None,
) -> Run:
    """Train once.

    The same arguments give the same run on one machine with one number of threads (times aside).
    The loss recorded is the cross-entropy alone, without the penalty of the arm.

    Args:
        experiment: model, length, batch size and momentum.
        arm: the remedy.
        learning_rate: of SGD.
        seed: fixes the weights and the order of the batches.
        data: what to train and test on.
        on_step: called after each step with the number of steps made and the batch loss.
    """
    generator = torch.Generator().manual_seed(seed)
    model = experiment.model.build(
        data.train_inputs.shape[1], data.classes, generator, arm.init_gain
    )
    optimizer = arm.optimizer(model.parameters(), learning_rate, experiment.momentum)
    batches = _batches(len(data.train_labels), experiment.batch_size, generator)
    start_loss, _ = _evaluate(model, data.train_inputs, data.train_labels)
    losses: list[float] = []
    norms: list[float] = []
    seconds: list[float] = []
    nonfinite_step: int | None = None

    while len(losses) < experiment.steps:
        batch = next(batches)
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch])
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
        norms.append(_norm(optimizer.grad_norm))
        if on_step is not None:
            on_step(len(losses), losses[-1])
        if not math.isfinite(losses[-1]):
            nonfinite_step = nonfinite_step or len(losses)
            if not all(bool(p.isfinite().all()) for p in model.parameters()):
                break  # nothing brings them back

    final_loss, _ = _evaluate(model, data.train_inputs, data.train_labels)
    _, test_accuracy = _evaluate(model, data.test_inputs, data.test_labels)
    return Run(
        arm=arm.name,
        learning_rate=learning_rate,
        seed=seed,
        steps=len(losses),
        start_loss=start_loss,
        final_loss=final_loss,
        peak_loss=_largest(losses),
        nonfinite_step=nonfinite_step,
        test_accuracy=test_accuracy,
        chance=data.chance,
        clipped_steps=optimizer.clipped_steps,
        max_grad_norm=_largest(norms),
        seconds_per_step=statistics.median(seconds),
        curve=thin(losses, norms),
    )


def thin(losses: list[float], norms: list[float], points: int = _CURVE_POINTS) -> Curve:
    """Thin per-step values to at most ``points`` points; the first and last step stand alone."""
    count = len(losses)
    # Evenly spaced in log(step): an explosion takes five steps, learning takes a thousand.
    ends = np.unique(np.geomspace(1, count, points).round().astype(int))
    if len(ends) > 2 and ends[-2] < count - 1:
        ends = np.append(ends[:-2], [count - 1, count])
    starts = np.concatenate(([0], ends[:-1]))
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    return Curve(
        step=tuple(ends.tolist()),
        loss=tuple(statistics.fmean(losses[a:b]) for a, b in spans),
        grad_norm=tuple(_largest(norms[a:b]) for a, b in spans),
    )


def _batches(examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches for ever, every example at most once between two shuffles."""
    while True:
        order = torch.randperm(examples, generator=generator)
        for batch in order.split(batch_size):
            if len(batch) == batch_size:
                yield batch


def _evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float | None]:
    """Return the mean cross-entropy and the accuracy, None where outputs are not finite."""
    with torch.no_grad():
        outputs = model(inputs)
        loss = cross_entropy(outputs, labels).item()
        if not bool(outputs.isfinite().all()):
            return loss, None  # the argmax of NaN is class 0, which is not a prediction
        return loss, int((outputs.argmax(1) == labels).sum()) / len(labels)


def _norm(grad_norm: Tensor | None) -> float:
    return math.nan if grad_norm is None else grad_norm.item()


def _largest(values: list[float]) -> float:
    """Return the largest value that is not NaN, NaN if there is none."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)
