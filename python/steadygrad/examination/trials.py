"""Tries remedies on copies of the network for a number of steps, and judges whether the runs hold."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from steadygrad.clip import clip_grad_norm_
from steadygrad.examination.curvature import step_scale, step_size
from steadygrad.examination.measuring import LossOf, copied, sharpness_of, trainable

# A run is lost if its loss rises to 5 times the loss at the start. It is also lost if the loss has not fallen to 0.7 of
# that at the start and the learning rate is too large for the curvature. For the network as it is, which gets 128
# steps, the rate is too large if it stays above 0.3 of the largest stable one. For a remedy, which gets 16 steps, it is
# too large if it is 5 times the largest stable rate at the start, and still above 0.3 of it at the end of a warm-up.
# docs/examine.md says how these numbers were chosen, and how well they predict other runs.
STEPS, REMEDY_STEPS = 128, 16
_LOOKS = (16, 32, 64)
_RISEN, _FALLEN, EDGE, _UNSTABLE = 5.0, 0.7, 0.3, 5.0
_PRODUCTS, _MICRO_BATCHES = 8, 4
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNBOUNDED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Softplus)


@dataclass(frozen=True)
class Trial:
    """Records how a remedy did on a copy of the network.

    Attributes:
        remedy: Name of the remedy; ``"as it is"`` for none.
        holds: Whether the run is expected to survive.
        ratios: Learning rate after the clip, divided by the largest stable one. The first is taken at the start; others
            after 16, 32 and 64 steps of the network as it is, and at the end of a warm-up. NaN if unknown.
        first_step: Length of the first step, divided by the norm of the parameters.
        losses: Loss of each step; at most 128 steps of the network as it is, and 16 of a remedy.
    """

    remedy: str
    holds: bool
    ratios: tuple[float, ...]
    first_step: float
    losses: tuple[float, ...]

    @property
    def end(self) -> float:
        """Returns the last loss if it rose out of bounds, else the mean of the last quarter of the losses."""
        risen = not self.losses[-1] <= _RISEN * abs(self.losses[0])
        return self.losses[-1] if risen else statistics.fmean(self.losses[-len(self.losses) // 4 :])

    def __str__(self) -> str:
        """Returns a row of the table of remedies."""
        way = f"{self.losses[0]:.3g} -> {self.end:.3g} in {len(self.losses)} steps"
        falls = self.end < 0.99 * self.losses[0]
        verdict = ("holds" if falls else "flat") if self.holds else "lost"
        return f"{self.remedy:<24} {verdict:<6} {way:<34} {self.first_step:>10.2g} {self.ratios[0]:>10.2g}"


def try_remedies(
    model: nn.Module,
    loss_of: LossOf,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    found: Any,
) -> list[Trial]:
    """Tries the network as it is, and every remedy that applies to it, on copies of model and optimizer.

    Raises the optimizer's own error if its step needs more than gradients.
    """
    own = float(optimizer.param_groups[0].get("max_norm") or math.inf)
    last = [layer.name for layer in found.layers if layer.has_weight][-1:]
    relu = any(units.kind == "ReLU" for units in found.units)
    limit, half = found.max_norm, found.largest_stable_lr / 2
    trials: list[Trial] = []

    def attempt(
        remedy: str,
        change: Callable[[nn.Module], bool] = lambda network: True,
        limit: float = math.inf,
        data: Sequence[Any] = batches,
        scale: float = 1.0,
        **how: Any,
    ) -> None:
        network = copied(model)
        stepper = _twin(optimizer, model, network)
        for group in stepper.param_groups:
            group["lr"] = scale * float(group["lr"])
        torch.manual_seed(0)
        try:
            if change(network):
                trials.append(_try(remedy, network, stepper, loss_of, data, min(limit, own), **how))
        except Exception:
            if not trials:
                raise  # The network fails without any remedy, so the error is not due to one.

    def initialise(network: nn.Module) -> bool:
        return _initialise(network, relu)

    attempt("")
    if trials[0].holds and not found.verdicts:
        return trials
    attempt("clip", limit=limit)
    if 0 < half < found.lr:
        attempt("learning rate", scale=half / found.lr)
    attempt("warm-up", warm_up=True)
    attempt("L2", l2=1e-2)
    attempt("accumulation", micro_batches=_MICRO_BATCHES)
    attempt("initialisation", initialise)
    attempt("clip and initialisation", initialise, limit=limit)
    attempt("batch norm", lambda network: _normalise(network, last), bounded=True)
    attempt("fewer layers", _leave_out)
    attempt("activation", _bound, bounded=True)
    normal = [_normal(batch) for batch in batches]
    if any(new is not old for new, old in zip(normal, batches, strict=True)):
        attempt("normalised data", data=normal)
    return trials


def _twin(
    optimizer: torch.optim.Optimizer, model: nn.Module, network: nn.Module
) -> torch.optim.Optimizer:
    """Returns a plain torch optimizer of the same kind for a copy; a stabilized one would write telemetry."""
    twins = dict(zip(model.parameters(), network.parameters(), strict=True))
    groups = [
        {**group, "params": [twins[p] for p in group["params"] if p in twins]}
        for group in optimizer.param_groups
    ]
    bases: Any = type(optimizer).__mro__
    kind = next(base for base in bases if base.__module__.startswith("torch.optim."))
    copied: torch.optim.Optimizer = kind([group for group in groups if group["params"]])
    for p, twin in twins.items():
        if p in optimizer.state:
            copied.state[twin] = copy.deepcopy(optimizer.state[p])
    return copied


# Each of the next functions changes a network, and returns whether there was anything to change.


@torch.no_grad()
def _initialise(network: nn.Module, relu: bool) -> bool:
    """Draws weights by He's rule (2015) or Glorot's (2010), recurrent ones orthogonal; sets biases to zero."""
    kinds = (nn.Linear, nn.RNNBase, *_CONVOLUTIONS)
    chosen = [module for module in network.modules() if isinstance(module, kinds)]
    for module in chosen:
        for name, p in module.named_parameters(recurse=False):
            if p.dim() < 2:
                nn.init.zeros_(p)
            elif name.startswith("weight_hh"):
                for part in p.split(p.shape[1]):
                    nn.init.orthogonal_(part)
            elif relu and not isinstance(module, nn.RNNBase):
                nn.init.kaiming_normal_(p, nonlinearity="relu")
            else:
                nn.init.xavier_normal_(p)
    return bool(chosen)


def _normalise(network: nn.Module, last: Sequence[str]) -> bool:
    """Normalises over the batch the outputs of linear and convolutional layers, except for the last layers."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        channels = 1 if isinstance(module, _CONVOLUTIONS) else output.dim() - 1
        rest = [dim for dim in range(output.dim()) if dim != channels]
        variance, mean = torch.var_mean(output, rest, correction=0, keepdim=True)
        return torch.as_tensor((output - mean) * (variance + 1e-5).rsqrt())

    inner = [module for name, module in network.named_modules() if name not in last]
    chosen = [module for module in inner if isinstance(module, (nn.Linear, *_CONVOLUTIONS))]
    if any("Norm" in type(module).__name__ for module in inner):
        return False
    for module in chosen:
        module.register_forward_hook(hook)
    return bool(chosen)


def _leave_out(network: nn.Module) -> bool:
    """Bypasses every second of three or more child modules of the same kind and shapes."""
    left_out = 0
    for parent in network.modules():
        alike: dict[Any, list[nn.Module]] = {}
        for child in parent.children():
            shapes = tuple(p.shape for p in child.parameters())
            if shapes:
                alike.setdefault((type(child), shapes), []).append(child)
        for child in (c for group in alike.values() if len(group) > 2 for c in group[1::2]):
            child.register_forward_hook(lambda module, inputs, output: inputs[0])
            left_out += 1
    return left_out > 0


def _bound(network: nn.Module) -> bool:
    """Replaces activation modules that are not bounded with tanh."""
    found = [
        (parent, name)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, _UNBOUNDED)
    ]
    for parent, name in found:
        setattr(parent, name, nn.Tanh())
    return bool(found)


def _normal(batch: Any) -> Any:
    """Returns a batch with normalised inputs; the batch itself if its inputs are small already, or unknown."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.abs().max() <= 10:
        return batch
    return (inputs - inputs.mean()) / inputs.std().clamp_min(1e-6), batch[1]


def _try(
    remedy: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: LossOf,
    batches: Sequence[Any],
    limit: float,
    warm_up: bool = False,
    l2: float = 0.0,
    micro_batches: int = 1,
    bounded: bool = False,
) -> Trial:
    parameters = list(trainable(network).values())
    rate, product = step_size(optimizer)
    schedule = LinearLR(optimizer, 0.01, total_iters=REMEDY_STEPS) if warm_up else None
    losses: list[float] = []
    ratios: list[float] = []
    first_step = math.nan
    steps, looks = (REMEDY_STEPS, {0}) if remedy else (STEPS, {0, *_LOOKS})
    if warm_up:
        looks.add(REMEDY_STEPS - 1)  # At the end of the warm-up the rate is nearly full.
    for step in range(steps):
        for p in parameters:
            p.grad = p.detach() * l2
        losses.append(0.0)
        for micro in range(micro_batches):
            batch = batches[(step * micro_batches + micro) % len(batches)]
            loss = loss_of(network, batch) / micro_batches
            losses[-1] += loss.item()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for p, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and p.grad is not None:
                    p.grad += gradient
        if not losses[-1] <= _RISEN * abs(losses[0]):  # "not <=" is true of NaN, too.
            break
        norm = float(clip_grad_norm_(parameters, limit))
        if step in looks:
            squares = [p.detach() * 0 if p.grad is None else p.grad.square() for p in parameters]
            try:
                scale = step_scale(optimizer, parameters, squares)
                curved = sharpness_of(network, loss_of, batch, scale, _PRODUCTS) + l2
            except RuntimeError:
                curved = math.nan  # An operation has no second derivative.
            ratios.append(rate * curved / product * min(1.0, limit / max(norm, 1e-30)))
        before = [p.detach().clone() for p in parameters] if not step else []
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if not step:
            first_step = _length(p - b for p, b in zip(parameters, before, strict=True))
            first_step /= max(_length(before), 1e-30)
    trial = Trial(
        remedy or "as it is", True, tuple(ratios or [math.nan]), first_step, tuple(losses)
    )
    lost = len(losses) < steps or not losses[-1] <= _RISEN * abs(losses[0])
    # A clip bounds every step; batch norm and tanh bound what large weights can do.
    if limit == math.inf and not bounded and trial.end > _FALLEN * abs(losses[0]):
        late = statistics.median([r for r in ratios[1:] if not math.isnan(r)] or [0.0])
        first, last = trial.ratios[0], trial.ratios[-1]
        lost |= first > _UNSTABLE and last > EDGE if remedy else late > EDGE
    return replace(trial, holds=not lost)


def _length(tensors: Any) -> float:
    return math.hypot(*(float(t.detach().float().norm()) for t in tensors))
