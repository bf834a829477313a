"""Tries remedies on copies of the network for a number of steps, and judges whether the runs hold."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LinearLR

from steadygrad.clip import clip_grad_norm_
from steadygrad.examination.curvature import sharpness
from steadygrad.examination.examination import Examination, Trial
from steadygrad.examination.measuring import LossOf, copied, norm_of, ratio

# A run is lost if its loss rises to 5 times the largest loss that a batch has at the start. It is also lost if the loss
# has not fallen to 0.7 of the mean over the batches at the start and the learning rate is too large for the curvature.
# For the network as it is, which gets 128 steps, the rate is too large if it stays above 0.3 of the largest stable one.
# For a remedy, which gets 16 steps, it is too large if it is 5 times the largest stable rate at the start, and still
# above 0.3 of it at the end of a warm-up. docs/examine.md says how these numbers were chosen, and how well they predict
# other runs.
STEPS, REMEDY_STEPS = 128, 16
_LOOKS = (16, 32, 64)
_RISEN, _FALLEN, EDGE, _UNSTABLE = 5.0, 0.7, 0.3, 5.0
_PRODUCTS, _MICRO_BATCHES = 8, 4
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNBOUNDED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Softplus)


def try_remedies(
    model: nn.Module,
    loss_of: LossOf,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    found: Examination,
) -> list[Trial]:
    """Tries the network as it is, and every remedy that applies to it, on copies of model and optimizer.

    Raises the optimizer's own error if its step needs more than gradients.
    """
    trials = [_try("as it is", model, loss_of, optimizer, batches)]
    if trials[0] and (not trials[0].holds or found.verdicts):
        for remedy, how in _remedies(found, batches):
            with contextlib.suppress(Exception):  # Not every network puts up with every remedy.
                trials.append(
                    _try(remedy, model, loss_of, optimizer, **{"batches": batches, **how})
                )
    return [trial for trial in trials if trial is not None]


def _remedies(found: Examination, batches: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each remedy with the arguments for :func:`_try`."""
    last = [layer.name for layer in found.layers if layer.has_weight][-1:]
    relu = any(units.kind == "ReLU" for units in found.units)
    limit, half = found.max_norm, found.largest_stable_lr / 2

    def initialise(network: nn.Module) -> bool:
        return _initialise(network, relu)

    yield "clip", {"limit": limit}
    if 0 < half < found.lr:
        yield "learning rate", {"scale": half / found.lr}
    yield "warm-up", {"warm_up": True}
    yield "L2", {"l2": 1e-2}
    yield "accumulation", {"micro_batches": _MICRO_BATCHES}
    yield "initialisation", {"change": initialise}
    yield "clip and initialisation", {"change": initialise, "limit": limit}
    yield "batch norm", {"change": lambda network: _normalise(network, last), "bounded": True}
    yield "fewer layers", {"change": _leave_out}
    yield "activation", {"change": _bound, "bounded": True}
    normal = [_normal(batch) for batch in batches]
    if any(new is not old for new, old in zip(normal, batches, strict=True)):
        yield "normalised data", {"batches": normal}


def _try(
    remedy: str,
    model: nn.Module,
    loss_of: LossOf,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    change: Callable[[nn.Module], bool] = lambda network: True,
    limit: float = math.inf,
    scale: float = 1.0,
    warm_up: bool = False,
    l2: float = 0.0,
    micro_batches: int = 1,
    bounded: bool = False,
) -> Trial | None:
    """Trains a copy with a remedy, and judges the run; returns None if there was nothing to ``change``."""
    network = copied(model)
    optimizer = _twin(optimizer, model, network)
    torch.manual_seed(0)
    if not change(network):
        return None
    limit = min(limit, float(optimizer.param_groups[0].get("max_norm") or math.inf))
    for group in optimizer.param_groups:
        group["lr"] = scale * float(group["lr"])
    rate = float(optimizer.param_groups[0]["lr"])
    schedule = LinearLR(optimizer, 0.01, total_iters=REMEDY_STEPS) if warm_up else None
    plain = remedy == "as it is"
    steps, looks = (STEPS, {0, *_LOOKS}) if plain else (REMEDY_STEPS, {0})
    if warm_up:
        looks.add(REMEDY_STEPS - 1)  # At the end of the warm-up the rate is nearly full.
    parameters = [p for p in network.parameters() if p.requires_grad]
    # Batches differ: a loss says little beside that of another batch.
    starts = [loss_of(network, batch).item() for batch in batches]
    start, bound = statistics.fmean(starts), _RISEN * max(map(abs, starts))
    losses: list[float] = []
    ratios: list[float] = []
    first_step = math.nan
    for step in range(steps):
        gradients = [p.detach() * l2 for p in parameters]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        losses.append(0.0)
        for micro in range(micro_batches):
            batch = batches[(step * micro_batches + micro) % len(batches)]
            loss = loss_of(network, batch) / micro_batches
            losses[-1] += loss.item()
            loss.backward(inputs=parameters)
        if not losses[-1] <= bound:  # "not <=" is true of NaN, too.
            break
        norm = float(clip_grad_norm_(parameters, limit))
        if step in looks:
            squares = [gradient.square() for gradient in gradients]
            stable = math.nan
            with contextlib.suppress(RuntimeError):  # An operation has no second derivative.
                _, stable = sharpness(
                    network, loss_of, batch, optimizer, parameters, squares, _PRODUCTS
                )
            ratios.append(rate / stable * min(1.0, limit / max(norm, 1e-30)))
        before = [p.detach().clone() for p in parameters] if not step else []
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if not step:
            moved = norm_of(p - b for p, b in zip(parameters, before, strict=True))
            first_step = ratio(moved, norm_of(before))
    holds = losses[-1] <= bound
    end = statistics.fmean(losses[-len(losses) // 4 :]) if holds else losses[-1]
    # A clip bounds every step; batch norm and tanh bound what large weights can do.
    if limit == math.inf and not bounded and end > _FALLEN * abs(start):
        late = statistics.median([r for r in ratios[1:] if not math.isnan(r)] or [0.0])
        too_fast = late > EDGE if plain else ratios[0] > _UNSTABLE and ratios[-1] > EDGE
        holds = holds and not too_fast
    ratios = ratios or [math.nan]
    return Trial(remedy, holds, tuple(ratios), first_step, tuple(losses), start, end)


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
    if kind is torch.optim.Optimizer:
        raise TypeError(f"{type(optimizer).__name__} is not one of torch's optimizers")
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
        channels = 1 if isinstance(module, _CONVOLUTIONS) else -1
        moved = functional.batch_norm(output.movedim(channels, 1), None, None, training=True)
        return moved.movedim(1, channels)

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
