"""Tries remedies on copies of the network for a few steps, to see whether they lead anywhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steadygrad.clip import clip_grad_norm_
from steadygrad.examination.curvature import step_size
from steadygrad.examination.measuring import LossOf, sharpness_of, trainable

STEPS = 16
# A run is lost if its loss rises to five times the first loss; or if its learning rate is five times the largest stable
# one and the loss is not below 0.7 of the first after 16 steps. Below five times the stable rate networks often find a
# flatter place (Lewkowycz et al. 2020). The numbers were fixed on half of the study's problems and judged on the other
# half: docs/examine.md.
_RISEN, _UNSTABLE, _FALLEN = 5.0, 5.0, 0.7
_PRODUCTS = 8
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Trial:
    """A remedy, tried on a copy.

    Attributes:
        remedy: Name of the remedy; ``"as it is"`` for none.
        holds: Whether the run is expected to survive.
        ratio: Learning rate divided by the largest stable one, after the clip; NaN if that is unknown.
        first_step: Length of the first step, divided by the norm of the parameters.
        losses: Loss of each step, at most 16.
    """

    remedy: str
    holds: bool
    ratio: float
    first_step: float
    losses: tuple[float, ...]

    def __str__(self) -> str:
        """Returns the result in one line."""
        return (
            f"{self.remedy:<24} {'holds' if self.holds else 'lost':<6}"
            f" loss {self.losses[0]:.3g} -> {self.losses[-1]:.3g}, first step {self.first_step:.2g}"
            f" of the parameters, lr {self.ratio:.2g} x the stable one"
        )


def try_remedies(
    model: nn.Module,
    loss_of: LossOf,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    found: Any,
) -> list[Trial]:
    """Tries the network as it is, and every remedy that applies to it, on copies of model and optimizer.

    Raises RuntimeError or TypeError if they cannot be copied, or if the optimizer's step needs more than gradients.
    """
    own = float(optimizer.param_groups[0].get("max_norm") or math.inf)

    def trial(
        name: str,
        change: Callable[[nn.Module], None] | None = None,
        limit: float = math.inf,
        **how: Any,
    ) -> Trial:
        network = copy.deepcopy(model)
        stepper = _copied(optimizer, model, network)
        torch.manual_seed(0)
        if change is not None:
            change(network)
        data = [_normal(batch) for batch in batches] if how.pop("normal", False) else batches
        return _try(name, network, stepper, loss_of, data, min(limit, own), **how)

    limit, stable = found.max_norm, found.largest_stable_lr
    last = next((layer.name for layer in reversed(found.layers) if layer.has_weight), "")
    relu = any(units.kind == "ReLU" for units in found.units)

    def initialise(network: nn.Module) -> None:
        _initialise(network, relu)

    trials = [trial("as it is")]
    if trials[0].holds and not found.verdicts:
        return trials
    trials.append(trial("clip", limit=limit))
    if 0 < stable < math.inf:
        trials.append(trial("learning rate", rate=stable / 2))
    trials += [trial("warm-up", warm_up=True), trial("L2", l2=1e-2)]
    trials.append(trial("initialisation", initialise))
    trials.append(trial("clip and initialisation", initialise, limit=limit))
    inner = [m for name, m in model.named_modules() if name != last]
    plain = not any("Norm" in type(module).__name__ for module in inner)
    if plain and any(isinstance(module, (nn.Linear, *_CONVOLUTIONS)) for module in inner):
        trials.append(trial("batch norm", lambda net: _normalise(net, last), normalised=True))
    if any(_normal(batch) is not batch for batch in batches):
        trials.append(trial("normalised data", normal=True))
    return trials


def _copied(
    optimizer: torch.optim.Optimizer, model: nn.Module, network: nn.Module
) -> torch.optim.Optimizer:
    """Returns a plain torch optimizer of the same kind for a copy of the model; ours would write its telemetry."""
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


@torch.no_grad()
def _initialise(network: nn.Module, relu: bool) -> None:
    """Draws He's (2015) or Glorot's (2010) initial weights, and orthogonal recurrent ones; sets biases to zero."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.RNNBase, *_CONVOLUTIONS)):
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


def _normalise(network: nn.Module, last: str) -> None:
    """Normalises the outputs of linear and convolutional layers, except the last, over the batch."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        channels = 1 if isinstance(module, _CONVOLUTIONS) else output.dim() - 1
        rest = [dim for dim in range(output.dim()) if dim != channels]
        variance, mean = torch.var_mean(output, rest, correction=0, keepdim=True)
        return torch.as_tensor((output - mean) * (variance + 1e-5).rsqrt())

    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and name != last:
            module.register_forward_hook(hook)


def _normal(batch: Any) -> Any:
    """Returns a batch with normalised inputs; the batch itself if they are normalised already, or are not known."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.abs().max() <= 10:
        return batch
    return (inputs - inputs.mean()) / inputs.std().clamp_min(1e-6), batch[1]


def _try(
    name: str,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: LossOf,
    batches: Sequence[Any],
    limit: float,
    rate: float = math.nan,
    warm_up: bool = False,
    l2: float = 0.0,
    normalised: bool = False,
) -> Trial:
    parameters = list(trainable(network).values())
    own, product = step_size(optimizer)
    groups = optimizer.param_groups
    rates = [float(group["lr"]) * (1.0 if math.isnan(rate) else rate / own) for group in groups]
    start = math.hypot(*(float(p.detach().norm()) for p in parameters))
    losses: list[float] = []
    ratio = first_step = math.nan
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        for group, whole in zip(groups, rates, strict=True):
            group["lr"] = whole * (0.01 + 0.99 * step / STEPS if warm_up else 1.0)
        loss = loss_of(network, batch)
        losses.append(loss.item())
        if not losses[-1] <= _RISEN * abs(losses[0]):  # also true for NaN
            break
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = None if gradient is None else gradient.to_dense().add(p.detach(), alpha=l2)
        norm = float(clip_grad_norm_(parameters, limit))
        if step:
            optimizer.step()
            continue
        squares = [p.detach() * 0 if p.grad is None else p.grad.square() for p in parameters]
        try:
            curved = sharpness_of(network, loss_of, batch, optimizer, squares, _PRODUCTS) + l2
            ratio = rates[0] * curved / product * min(1.0, limit / max(norm, 1e-30))
        except RuntimeError:
            pass  # An operation has no second derivative.
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        moved = (float((p.detach() - b).norm()) for p, b in zip(parameters, before, strict=True))
        first_step = math.hypot(*moved) / max(start, 1e-30)
    lost = not losses[-1] <= _RISEN * abs(losses[0])
    # A clip bounds every step, and a normalised network does not depend on how large its weights are.
    if limit == math.inf and not normalised:
        lost |= ratio > _UNSTABLE and losses[-1] > _FALLEN * abs(losses[0])
    return Trial(name, not lost, ratio, first_step, tuple(losses))
