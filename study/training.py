"""One training run, from a seed to a record of what happened."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from steadygrad import accumulate

from .arms import Arm, OurStepper, Stepper
from .experiment import Experiment, Problem, RunKey
from .explosion import first_explosion
from .models import ActivationTerm
from .tasks import Batch, Task

_CURVE_POINTS = 64
# Later ones differ by more than rounding: what explodes is chaotic.
_FIRST_LOSSES = 5
_DIGITS = 5


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
class Evaluations:
    """The metric while training.

    Attributes:
        step: steps made until then.
        metric: on held-out data, NaN where outputs were not finite.
    """

    step: tuple[int, ...]
    metric: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """What one run did.

    Attributes:
        problem: its name.
        arm: name of the remedy.
        learning_rate: of SGD.
        seed: of the weights and batches.
        steps: steps made; a run ends early once its parameters are not finite.
        start_loss: loss on the training part before the first step.
        final_loss: the same after the last step.
        peak_loss: largest batch loss that was not NaN.
        metric: on the held-out part, None if an output was not finite.
        survived: whether the final loss is finite and below the loss at the start.
        learned: whether it survived and the metric reached the task's bound.
        nonfinite_step: first step whose batch loss or gradient norm was not finite, or None.
        exploded_step: first step of the explosion, or None; see :mod:`.explosion`.
        exploded_parameter: whose gradient grew most at that step, or None.
        max_grad_norm: largest gradient norm before clipping that was not NaN.
        median_grad_norm: median of the norms that were finite.
        clipped_steps: steps at which the norm was clipped, or the value of an element.
        skipped_steps: steps that were left out.
        steps_to_target: steps until an evaluation found the metric at its target, or None.
        seconds_per_step: median time of forward, backward and optimizer step.
        memory_bytes: parameters, gradients, optimizer state and what autograd kept for backward.
        first_losses: batch losses of the first 5 steps.
        curve: thinned loss and gradient norm.
        evaluations: the metric while training.
    """

    problem: str
    arm: str
    learning_rate: float
    seed: int
    steps: int
    start_loss: float
    final_loss: float
    peak_loss: float
    metric: float | None
    survived: bool
    learned: bool
    nonfinite_step: int | None
    exploded_step: int | None
    exploded_parameter: str | None
    max_grad_norm: float
    median_grad_norm: float
    clipped_steps: int
    skipped_steps: int
    steps_to_target: int | None
    seconds_per_step: float
    memory_bytes: int
    first_losses: tuple[float, ...]
    curve: Curve | None
    evaluations: Evaluations

    @property
    def key(self) -> RunKey:
        """What it is filed under."""
        return RunKey(self.problem, self.arm, self.learning_rate, self.seed)


OnStep = Callable[[int, float], None]


def train(experiment: Experiment, key: RunKey, task: Task, on_step: OnStep | None = None) -> Run:
    """Train once.

    The same arguments give the same run on one machine with one number of threads (times aside).
    The loss recorded is that of the task alone, without the penalty of the arm.

    Args:
        experiment: problems and arms.
        key: which of them, the learning rate and the seed. The seed fixes weights and batches.
        task: of the problem.
        on_step: called after each step with the number of steps made and the batch loss.

    Raises:
        ValueError: the arm does not fit the task.
    """
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(key.seed)
        return _Training(experiment.problem(key.problem), experiment.arm(key.arm), key, task).run(
            on_step
        )


def rehearse(experiment: Experiment, key: RunKey, task: Task, measure: bool) -> None:
    """Build all that a run needs and take one loss: what is wrong shows before anything is trained.

    Args:
        experiment: problems and arms.
        key: which of them, the learning rate and the seed.
        task: of the problem.
        measure: whether the task's loss and metric are taken once, as well.

    Raises:
        Exception: whatever building or the loss raises.
        TypeError: the metric is no number.
    """
    with torch.random.fork_rng(devices=[]):
        training = _Training(experiment.problem(key.problem), experiment.arm(key.arm), key, task)
        training.rehearse(measure)


class _Training:
    def __init__(self, problem: Problem, arm: Arm, key: RunKey, task: Task) -> None:
        generator = torch.Generator().manual_seed(key.seed)
        self.problem, self.arm, self.key = problem, arm, key
        self.task = task if arm.task is None else arm.task(task)
        self.validation: Task | None = None
        if arm.early_stopping:
            self.task, self.validation = self.task.hold_out(key.seed)
        spec: Any = problem.model
        spec = replace(spec, **arm.model)
        self.model: nn.Module = spec.build(self.task.inputs, self.task.outputs, generator)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = list(self.model.parameters())
        self.stepper = arm.stepper(self.parameters, key.learning_rate, problem.momentum)
        self.scheduler = arm.schedule and arm.schedule(self.stepper.optimizer, problem.steps)
        self.batches = self.task.batches(problem.batch_size, generator)
        self.terms = [
            module for module in self.model.modules() if isinstance(module, ActivationTerm)
        ]
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.parameter_norms: list[list[float]] = []
        self.value_clipped_steps = 0
        self.seconds: list[float] = []
        self.memory = 0
        self.evaluated: list[tuple[int, float]] = []
        self.best: tuple[float, int, dict[str, Any]] | None = None

    def rehearse(self, measure: bool) -> None:
        self._loss(next(self.batches))[1].backward()
        if measure:
            found = [self.task.training_loss(self.model), self._evaluating(self.task.measure)]
            for value in found:
                if value is not None and not isinstance(value, (int, float)):
                    raise TypeError(
                        f"{type(self.task).__name__}: expected a loss and a metric that are numbers, "
                        f"got a {type(value).__name__}"
                    )

    def run(self, on_step: OnStep | None) -> Run:
        start_loss = self._evaluating(self.task.training_loss)
        every = max(1, self.problem.steps // self.problem.evaluations)
        while (step := len(self.losses)) < self.problem.steps:
            if step and step % every == 0 and self._look(step):
                break
            self._step()
            if on_step is not None:
                on_step(len(self.losses), self.losses[-1])
            if not math.isfinite(self.losses[-1]) and not self._parameters_finite():
                break  # nothing brings them back
        return self._record(start_loss)

    def _step(self) -> None:
        """One optimizer step; the clock stands still while norms are taken for the record."""
        count = self.arm.accumulate
        micro_batches = [next(self.batches) for _ in range(count)]
        ours = count > 1 and isinstance(self.stepper, OurStepper)
        began = time.perf_counter()
        self.stepper.optimizer.zero_grad()
        losses = []
        saved = _Saved() if not self.losses else None
        with saved or contextlib.nullcontext():
            for batch in micro_batches:
                with accumulate(self.stepper.optimizer) if ours else contextlib.nullcontext():
                    loss, total = self._loss(batch)
                    (total if ours or count == 1 else total / count).backward()
                losses.append(loss.detach())
        paused = time.perf_counter()
        scale = 1.0 / count if ours else 1.0  # there .grad is the sum
        self.parameter_norms.append([scale * norm for norm in self._gradient_norms()])
        self.value_clipped_steps += self._has_value_beyond_limit(scale)
        resumed = time.perf_counter()
        self.stepper.step()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.seconds.append(paused - began + time.perf_counter() - resumed)
        if saved is not None:
            self.memory = saved.count + _state_bytes(self.stepper, self.parameters)
        self.losses.append(statistics.fmean(loss.item() for loss in losses))
        norm = self.stepper.grad_norm
        if norm is None:
            norm = math.hypot(*self.parameter_norms[-1])
        self.norms.append(norm)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of the task, and the one that is differentiated."""
        loss = total = self.task.loss(self.model(batch[0]), batch[1])
        penalty = self.stepper.penalty()
        if penalty is not None:
            total = total + penalty
        for module in self.terms:
            assert module.term is not None
            total = total + module.term
        return loss, total

    def _gradient_norms(self) -> list[float]:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms: list[float] = torch.stack(torch._foreach_norm(gradients, 2)).tolist()
        if not all(map(math.isfinite, norms)):
            # A norm beyond fp32's range is not an infinite gradient.
            norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).tolist()
        return norms

    def _has_value_beyond_limit(self, scale: float) -> bool:
        limit = self.arm.clip_value
        return limit is not None and any(
            scale * p.grad.abs().max().item() > limit for p in self.parameters if p.grad is not None
        )

    def _look(self, step: int) -> bool:
        """Measure on held-out data; say whether it is time to stop."""
        metric = self._evaluating(self.task.measure)
        self.evaluated.append((step, math.nan if metric is None else metric))
        if isinstance(self.scheduler, ReduceLROnPlateau):
            since = self.evaluated[-2][0] if len(self.evaluated) > 1 else 0
            self.scheduler.step(statistics.fmean(self.losses[since:]))
        target = self.task.metric.target
        if self.problem.until_target and self.task.metric.reached(metric, target):
            return True
        if self.validation is None:
            return False
        loss = self._evaluating(self.validation.training_loss)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, step, copy.deepcopy(self.model.state_dict()))
        places = [place for place, _ in self.evaluated]
        return len(places) - 1 - places.index(self.best[1]) >= self.arm.early_stopping

    def _evaluating(self, measure: Callable[[nn.Module], Any]) -> Any:
        self.model.eval()
        try:
            return measure(self.model)
        finally:
            self.model.train()

    def _parameters_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.parameters)

    def _record(self, start_loss: float) -> Run:
        if self.best is not None:
            self.model.load_state_dict(self.best[2])
        final_loss = self._evaluating(self.task.training_loss)
        metric = self._evaluating(self.task.measure)
        if not self.evaluated or self.evaluated[-1][0] < len(self.losses):
            self.evaluated.append((len(self.losses), math.nan if metric is None else metric))
        survived = math.isfinite(final_loss) and final_loss < start_loss
        bound = self.task.metric
        explosion = first_explosion(
            self.losses,
            self.norms,
            np.asarray(self.parameter_norms),
            self.names,
            start_loss,
            final_loss,
        )
        broken = (
            step
            for step, pair in enumerate(zip(self.losses, self.norms, strict=True), 1)
            if not all(map(math.isfinite, pair))
        )
        reached = (step for step, value in self.evaluated if bound.reached(value, bound.target))
        return Run(
            **self.key._asdict(),
            steps=len(self.losses),
            start_loss=start_loss,
            final_loss=final_loss,
            peak_loss=_largest(self.losses),
            metric=metric,
            survived=survived,
            learned=survived and bound.reached(metric, bound.learned),
            nonfinite_step=next(broken, None),
            exploded_step=None if explosion is None else explosion.step,
            exploded_parameter=None if explosion is None else explosion.parameter,
            max_grad_norm=_largest(self.norms),
            median_grad_norm=_median([norm for norm in self.norms if math.isfinite(norm)]),
            # Optimizers count the steps at which the norm was clipped.
            clipped_steps=max(self.stepper.clipped_steps, self.value_clipped_steps),
            skipped_steps=self.stepper.skipped_steps,
            steps_to_target=next(reached, None),
            seconds_per_step=statistics.median(self.seconds),
            memory_bytes=self.memory,
            first_losses=tuple(self.losses[:_FIRST_LOSSES]),
            curve=thin(self.losses, self.norms),
            evaluations=Evaluations(
                tuple(step for step, _ in self.evaluated),
                tuple(_short(value) for _, value in self.evaluated),
            ),
        )


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for backward, each storage once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.count = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Parameters are saved as well, and counted elsewhere.
        if storage.data_ptr() not in self._seen and not isinstance(tensor, nn.Parameter):
            self._seen.add(storage.data_ptr())
            self.count += storage.nbytes()
        return tensor


def _state_bytes(stepper: Stepper, parameters: list[nn.Parameter]) -> int:
    state = [
        value
        for entry in stepper.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return sum(tensor.nbytes for tensor in (*parameters, *gradients, *state))


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
        loss=tuple(_short(statistics.fmean(losses[a:b])) for a, b in spans),
        grad_norm=tuple(_short(_largest(norms[a:b])) for a, b in spans),
    )


def _short(value: float) -> float:
    """A number of a curve: it is drawn, not computed with."""
    return float(f"{value:.{_DIGITS}g}")


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def _largest(values: list[float]) -> float:
    """Return the largest value that is not NaN, NaN if there is none."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)
