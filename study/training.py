"""Train one run, from a seed to a record of what happened."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from steadygrad import Stabilizer, accumulate

from .experiment import Experiment, RunKey
from .explosion import first_explosion
from .models import ActivationTerm
from .remedies import TorchStepper
from .tasks import Batch, Task

_CURVE_POINTS = 64
# Later losses differ by more than rounding, since exploding runs are chaotic.
_FIRST_LOSSES = 5


@dataclass(frozen=True)
class Curve:
    """Holds loss and gradient norm over a run, at points about evenly spaced in log(step)."""

    step: tuple[int, ...]  # last step that a point stands for; the first step is 1
    loss: tuple[float, ...]  # mean batch loss of the steps since the previous point
    grad_norm: tuple[float, ...]  # largest gradient norm of the same steps


@dataclass(frozen=True)
class Run:
    """Records what one run did."""

    problem: str
    arm: str
    learning_rate: float
    seed: int  # seed of weights and batches
    steps: int  # steps made; a run ends once its loss and a parameter are not finite
    start_loss: float  # loss on the training part before the first step
    final_loss: float  # loss on the training part after the last step
    peak_loss: float  # largest batch loss that was not NaN
    metric: float | None  # metric on held-out data, None if an output is not finite
    survived: bool  # the final loss is finite and below the loss at the start
    learned: bool  # the run survived and the metric reached the task's bound
    nonfinite_step: int | None  # first step with a batch loss or norm that is not finite
    exploded_step: int | None  # first step of the explosion; see .explosion
    exploded_parameter: str | None  # parameter whose gradient grew most at that step
    max_grad_norm: float  # largest gradient norm before clipping that was not NaN
    median_grad_norm: float  # median of the finite gradient norms before clipping
    clipped_steps: int  # steps in which the norm or an element was clipped
    skipped_steps: int  # steps that the remedy skipped
    steps_to_target: int | None  # steps until the metric had reached its target
    seconds_per_step: float  # median time of forward, backward and optimizer step
    memory_bytes: int  # parameters, gradients, optimizer state and what autograd saved
    first_losses: tuple[float, ...]  # batch losses of the first 5 steps
    curve: Curve | None
    evaluations: dict[str, list[float]]  # "step" and "metric", NaN where outputs were not finite


def train(experiment: Experiment, key: RunKey, task: Task) -> Run:
    """Make one run of an experiment.

    The seed fixes weights and batches, so the same arguments give the same run, except for times,
    on the same machine with the same number of threads. Recorded losses are those of the task,
    without the penalty of the arm.

    Raises:
        ValueError: The arm does not fit the task.
    """
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(key.seed)
        return _Training(experiment, key, task).run()


def rehearse(experiment: Experiment, key: RunKey, task: Task, measure: bool) -> None:
    """Build all that a run needs and take one loss, so that errors show before training.

    With ``measure``, the training loss and the metric of the task are taken once as well.

    Raises:
        TypeError: The training loss or the metric is not a number.
        Exception: Building the network, or the loss, raised it.
    """
    with torch.random.fork_rng(devices=[]):
        training = _Training(experiment, key, task)
        training.loss(next(training.batches))[1].backward()
        if not measure:
            return
        for value in training.evaluating(task.training_loss), training.evaluating(task.measure):
            if value is not None and not isinstance(value, (int, float)):
                expected = f"a loss and a metric that are numbers, got a {type(value).__name__}"
                raise TypeError(f"{type(task).__name__}: expected {expected}")


class _Training:
    def __init__(self, experiment: Experiment, key: RunKey, task: Task) -> None:
        generator = torch.Generator().manual_seed(key.seed)
        self.key, self.problem = key, experiment.problem(key.problem)
        self.arm = experiment.arm(key.arm)
        self.task = task if self.arm.task is None else self.arm.task(task)
        self.validation: Task | None = None
        if self.arm.early_stopping:
            self.task, self.validation = self.task.hold_out(key.seed)
        spec: Any = replace(self.problem.model, **self.arm.model)
        self.model: nn.Module = spec.build(self.task.inputs, self.task.outputs, generator)
        self.names, parameters = zip(*self.model.named_parameters(), strict=True)
        self.parameters: list[nn.Parameter] = list(parameters)
        stepper = self.arm.stepper(self.parameters, key.learning_rate, self.problem.momentum)
        self.stepper = stepper
        self.optimizer = stepper if isinstance(stepper, Stabilizer) else stepper.optimizer
        self.scheduler = self.arm.schedule and self.arm.schedule(self.optimizer, self.problem.steps)
        self.batches = self.task.batches(self.problem.batch_size, generator)
        self.terms = [each for each in self.model.modules() if isinstance(each, ActivationTerm)]
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.parameter_norms: list[list[float]] = []
        self.seconds: list[float] = []
        self.value_clipped_steps = self.memory = 0
        self.evaluated: list[tuple[int, float]] = []
        self.best: tuple[float, int, dict[str, Any]] | None = None

    def run(self) -> Run:
        start_loss = self.evaluating(self.task.training_loss)
        every = max(1, self.problem.steps // self.problem.evaluations)
        while (step := len(self.losses)) < self.problem.steps:
            if step and step % every == 0 and self._look(step):
                break
            self._step()
            if not math.isfinite(self.losses[-1]) and not all(
                bool(p.isfinite().all()) for p in self.parameters
            ):
                break  # parameters that are not finite stay so
        return self._record(start_loss)

    def _step(self) -> None:
        """Make one optimizer step; the time of taking norms for the record is not counted."""
        count = self.arm.accumulate
        micro_batches = [next(self.batches) for _ in range(count)]
        ours = count > 1 and self.stepper is self.optimizer
        began = time.perf_counter()
        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        saved: dict[int, int] = {}
        for batch in micro_batches:
            # Counting the first is enough, since each backward frees its memory for the next.
            first = not self.losses and not losses
            counted = _counting(saved) if first else contextlib.nullcontext()
            summed = accumulate(self.optimizer) if ours else contextlib.nullcontext()
            with counted, summed:
                loss, total = self.loss(batch)
                (total if ours or count == 1 else total / count).backward()
            losses.append(loss.detach())
        paused = time.perf_counter()
        scale = 1.0 / count if ours else 1.0  # with accumulate(), .grad is the sum
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.parameter_norms.append([scale * norm for norm in _norms(gradients)])
        if (limit := self.arm.clip_value) is not None:
            self.value_clipped_steps += any(scale * g.abs().max().item() > limit for g in gradients)
        resumed = time.perf_counter()
        self.stepper.step()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.seconds.append(paused - began + time.perf_counter() - resumed)
        if not self.losses:
            states = self.optimizer.state.values()
            state = [v for entry in states for v in entry.values() if isinstance(v, Tensor)]
            kept = (*self.parameters, *gradients, *state)
            self.memory = sum(saved.values()) + sum(tensor.nbytes for tensor in kept)
        self.losses.append(statistics.fmean(loss.item() for loss in losses))
        norm = self.stepper.grad_norm
        self.norms.append(math.hypot(*self.parameter_norms[-1]) if norm is None else norm.item())

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of the task, and the loss with penalties, which is differentiated."""
        loss = total = self.task.loss(self.model(batch[0]), batch[1])
        # A Stabilizer adds its penalties in the step.
        penalty = self.stepper.penalty() if isinstance(self.stepper, TorchStepper) else None
        for term in (penalty, *(module.term for module in self.terms)):
            if term is not None:
                total = total + term
        return loss, total

    def _look(self, step: int) -> bool:
        """Measure the metric on held-out data; return whether to stop training."""
        metric = self.evaluating(self.task.measure)
        self.evaluated.append((step, math.nan if metric is None else metric))
        if isinstance(self.scheduler, ReduceLROnPlateau):
            since = self.evaluated[-2][0] if len(self.evaluated) > 1 else 0
            self.scheduler.step(statistics.fmean(self.losses[since:]))
        bound = self.task.metric
        if self.problem.until_target and bound.reached(metric, bound.target):
            return True
        if self.validation is None:
            return False
        loss = self.evaluating(self.validation.training_loss)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, step, copy.deepcopy(self.model.state_dict()))
        places = [place for place, _ in self.evaluated]
        return len(places) - 1 - places.index(self.best[1]) >= self.arm.early_stopping

    def evaluating(self, measure: Callable[[nn.Module], Any]) -> Any:
        """Return what ``measure`` returns for the network in evaluation mode, without gradients."""
        self.model.eval()
        try:
            with torch.no_grad():
                return measure(self.model)
        finally:
            self.model.train()

    def _record(self, start_loss: float) -> Run:
        if self.best is not None:
            self.model.load_state_dict(self.best[2])
        final_loss = self.evaluating(self.task.training_loss)
        metric, bound = self.evaluating(self.task.measure), self.task.metric
        if not self.evaluated or self.evaluated[-1][0] < len(self.losses):
            self.evaluated.append((len(self.losses), math.nan if metric is None else metric))
        survived = math.isfinite(final_loss) and final_loss < start_loss
        norms = np.asarray(self.parameter_norms)
        step, parameter = first_explosion(
            self.losses, self.norms, norms, self.names, start_loss, final_loss
        ) or (None, None)
        finite = np.isfinite(self.losses) & np.isfinite(self.norms)
        reached = (step for step, value in self.evaluated if bound.reached(value, bound.target))
        finite_norms = [norm for norm in self.norms if math.isfinite(norm)]
        return Run(
            **self.key._asdict(),
            steps=len(self.losses),
            start_loss=start_loss,
            final_loss=final_loss,
            peak_loss=_largest(self.losses),
            metric=metric,
            survived=survived,
            learned=survived and bound.reached(metric, bound.learned),
            nonfinite_step=None if finite.all() else int(np.argmin(finite)) + 1,
            exploded_step=step,
            exploded_parameter=parameter,
            max_grad_norm=_largest(self.norms),
            median_grad_norm=statistics.median(finite_norms) if finite_norms else math.nan,
            # Optimizers count only the steps in which the norm was clipped.
            clipped_steps=max(self.stepper.clipped_steps, self.value_clipped_steps),
            skipped_steps=self.stepper.skipped_steps,
            steps_to_target=next(reached, None),
            seconds_per_step=statistics.median(self.seconds),
            memory_bytes=self.memory,
            first_losses=tuple(self.losses[:_FIRST_LOSSES]),
            curve=thin(self.losses, self.norms),
            evaluations={
                "step": [step for step, _ in self.evaluated],
                "metric": [_short(value) for _, value in self.evaluated],
            },
        )


def _counting(saved: dict[int, int]) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context that notes the bytes of each storage that autograd keeps for backward."""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):  # parameters are counted elsewhere
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _norms(gradients: Sequence[Tensor]) -> list[float]:
    found = torch.stack(torch._foreach_norm(list(gradients), 2))
    if not bool(found.isfinite().all()):  # finite gradients can have a norm beyond fp32's range
        found = torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64))
    norms: list[float] = found.tolist()
    return norms


def thin(losses: list[float], norms: list[float], points: int = _CURVE_POINTS) -> Curve:
    """Thin values of all steps to at most ``points`` points; first and last step have their own."""
    count = len(losses)
    # Even spacing in log(step) shows both an explosion in five steps and learning in a thousand.
    ends = np.unique(np.geomspace(1, count, points).round().astype(int))
    if len(ends) > 2 and ends[-2] < count - 1:
        ends = np.append(ends[:-2], [count - 1, count])
    spans = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
    return Curve(
        step=tuple(ends.tolist()),
        loss=tuple(_short(statistics.fmean(losses[a:b])) for a, b in spans),
        grad_norm=tuple(_short(_largest(norms[a:b])) for a, b in spans),
    )


def _short(value: float) -> float:
    """Round a number of a curve, which is only drawn."""
    return float(f"{value:.5g}")


def _largest(values: list[float]) -> float:
    """Return the largest value that is not NaN, NaN if there is none."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)
