"""Build both sides of the races over parameters: steadygrad's calls, and what people use today.

A builder takes its own `Workload` and returns a candidate. Peers are torch's functions and
optimizers, or the usual loops where torch has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softshrink
from torch.nn.utils import clip_grad_norm_, get_total_norm

import steadygrad as sg
from benchmarks.shapes import ModelShapes
from benchmarks.timer import Candidate

OURS = "steadygrad"
TORCH_FOREACH = "torch foreach"
CLIP_FUSED = "torch clip + fused"
CLIP_DEFAULT = "torch clip + default"
CLIP_FOREACH = "torch clip + foreach"
FUSED_FOLDED = "torch fused, grad_scale"

# Every call lowers the limit by this factor, so that a clip stays active although gradients are not
# restored. After 10,000 calls they have a 20,000th of their size, far from denormal numbers.
_LIMIT_DECAY = 0.999


class Workload:
    """Holds parameters with standard normal gradients; each tensor is allocated alone, as in a model.

    Every candidate gets its own workload with the same numbers, so that it starts with cold buffers
    and never works on what another candidate has written.

    Args:
        model: Shapes of the parameters.
        params: Whether to draw the parameters; if False their memory is reserved and never touched.
        grads: Whether to draw gradients; if False the parameters have none.
        clip_active: Whether the limit starts at half the gradients' norm and `tighten` lowers it; if
            False the limit is twice the norm and stays.
        rows_reached: Share of the rows whose gradient is not zero.
        dtype: Dtype of parameters and gradients.
        device: Device of the tensors. Default: the CPU.
    """

    def __init__(
        self,
        model: ModelShapes,
        *,
        params: bool = True,
        grads: bool = True,
        clip_active: bool = True,
        rows_reached: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        generator = torch.Generator(self.device).manual_seed(0)

        def drawn(shape: tuple[int, ...], wanted: bool) -> Tensor:
            values = torch.empty(shape, dtype=dtype, device=self.device)
            return values.normal_(generator=generator) if wanted else values

        self._clip_active = clip_active
        # The norm of n standard normal numbers is sqrt(n) to within a fraction of a percent.
        self._norm = math.sqrt(rows_reached * model.elements)
        self.fraction = 0.5 if clip_active else 2.0
        self.params: list[torch.nn.Parameter] = []
        for shape in model.shapes:
            grad = drawn(shape, True) if grads else None
            if grad is not None and rows_reached < 1:
                grad[round(rows_reached * shape[0]) :] = 0
            self.params.append(torch.nn.Parameter(drawn(shape, params)))
            self.params[-1].grad = grad
        self.grads = [param.grad for param in self.params if param.grad is not None]

    @property
    def limit(self) -> float:
        """Return `max_norm` for the next call."""
        return self.fraction * self._norm

    def tighten(self) -> None:
        """Lower the limit below the norm that the last clip left, if clips are to stay active."""
        if self._clip_active:
            self.fraction *= _LIMIT_DECAY


Build = Callable[[Workload], Candidate]
# A function of a list of parameters and, for some peers, of torch's `fused` or `foreach` switch.
MakeOptimizer = Callable[..., Any]


def both(
    ours: Callable[..., object],
    torchs: Callable[..., object],
    arguments: Callable[[Workload], tuple[Any, ...]],
) -> tuple[Build, Build]:
    """Return builders that call a function of steadygrad and torch's with the same arguments.

    On plain tensors torch takes its foreach path.
    """
    return (
        _calling(OURS, lambda load: ours(*arguments(load))),
        _calling(TORCH_FOREACH, lambda load: torchs(*arguments(load))),
    )


def stabilizer_step(make: MakeOptimizer) -> Build:
    """Return a builder of steps of steadygrad.Stabilizer around the optimizer that `make` builds."""
    return own_class_step(lambda params, max_norm: sg.Stabilizer(make(params), max_norm=max_norm))


def own_class_step(make: MakeOptimizer, name: str = OURS) -> Build:
    """Return a builder of steps of the steadygrad.optim class that `make` builds with `max_norm`."""

    def build(load: Workload) -> Candidate:
        optimizer = make(load.params, max_norm=load.limit)

        def prepare() -> None:
            load.tighten()
            optimizer.param_groups[0]["max_norm"] = load.limit

        return Candidate(name, optimizer.step, prepare)

    return build


def clip_then_step(make: MakeOptimizer, name: str, **switches: bool) -> Build:
    """Return a builder of torch's clip_grad_norm_ and the step of the optimizer that `make` builds.

    `switches` are `fused=True` or `foreach=True`; without them torch takes its for-loop on CPUs and
    foreach on GPUs.
    """

    def build(load: Workload) -> Candidate:
        optimizer = make(load.params, **switches)

        def run() -> None:
            clip_grad_norm_(load.params, load.limit)
            optimizer.step()

        return Candidate(name, run, load.tighten)

    return build


def folded_step(make: MakeOptimizer) -> Build:
    """Return a builder of the strongest peer: torch's fused step, which clips by `grad_scale`.

    torch's fused step divides gradients by the `grad_scale` that a GradScaler sets. With max(1,
    norm / max_norm) in its place it clips without a pass over memory for the clip alone. torch's
    kernels write the divided gradients back. `found_inf` is not set, which torch allows, and which
    saves the launches that would undo the counted step.
    """

    def build(load: Workload) -> Candidate:
        optimizer = make(load.params, fused=True)

        def run() -> None:
            scale = ((get_total_norm(load.grads).float() + 1e-6) / load.limit).clamp_(min=1.0)
            optimizer.grad_scale = scale
            optimizer.step()

        return Candidate(FUSED_FOLDED, run, load.tighten)

    return build


def penalties(l1: float, l2: float) -> tuple[Build, ...]:
    """Return builders of add_penalty_ and its peers: a term of the loss, a loop, foreach calls."""

    def autograd(load: Workload) -> None:
        penalty = torch.zeros((), device=load.device)
        for param in load.params:
            penalty = penalty + l1 * param.abs().sum() + 0.5 * l2 * param.square().sum()
        penalty.backward()

    @torch.no_grad()
    def loop(load: Workload) -> Tensor:
        penalty = torch.zeros((), device=load.device)
        for param, grad in zip(load.params, load.grads, strict=True):
            grad.add_(param.sign(), alpha=l1).add_(param, alpha=l2)
            penalty += l1 * param.abs().sum() + 0.5 * l2 * param.square().sum()
        return penalty

    @torch.no_grad()
    def foreach(load: Workload) -> Tensor:
        params: list[Tensor] = [*load.params]
        torch._foreach_add_(load.grads, torch._foreach_sign(params), alpha=l1)
        torch._foreach_add_(load.grads, params, alpha=l2)
        absolute = torch.stack(torch._foreach_norm(params, 1)).sum()
        squared = torch.stack(torch._foreach_norm(params, 2)).square().sum()
        return l1 * absolute + 0.5 * l2 * squared

    return (
        _calling(OURS, lambda load: sg.add_penalty_(load.params, l1=l1, l2=l2)),
        _calling("torch autograd", autograd),
        _calling("torch loop", loop),
        _calling(TORCH_FOREACH, foreach),
    )


def thresholds(amount: float) -> tuple[Build, ...]:
    """Return builders of soft_threshold_ and its peers: the formula, and softshrink copied back."""

    @torch.no_grad()
    def formula(load: Workload) -> None:
        for param in load.params:
            param.copy_(param.sign() * (param.abs() - amount).clamp_(min=0.0))

    @torch.no_grad()
    def shrink(load: Workload) -> None:
        for param in load.params:
            param.copy_(softshrink(param, amount))

    return (
        _calling(OURS, lambda load: sg.soft_threshold_(load.params, amount)),
        _calling("torch sign * clamp", formula),
        _calling("torch softshrink", shrink),
    )


def _calling(name: str, call: Callable[[Workload], object]) -> Build:
    return lambda load: Candidate(name, lambda: call(load), load.tighten)
