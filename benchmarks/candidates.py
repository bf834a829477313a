"""Both sides of the races over parameters: steadygrad's calls, and what people use today.

A builder takes a `Workload` of its own and returns a candidate; peers are torch's functions and optimizers, or the
usual loops where torch has none.
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

# Every call lowers the limit by this factor, so a clip stays active without restoring gradients;
# 10,000 calls leave a 20,000th of their size, far from denormal numbers.
_LIMIT_DECAY = 0.999


class Workload:
    """Parameters with standard normal gradients, each tensor its own allocation as in a model.

    Every candidate gets a workload of its own with the same numbers: it starts with cold buffers, and what one
    candidate writes never changes the work of another.

    Args:
        model: the shapes.
        params: draw the parameters; otherwise their memory is reserved and never touched.
        grads: draw the gradients; otherwise the parameters have none.
        clip_active: start with a limit of half the gradients' norm, which `tighten` lowers; otherwise the limit is
            twice the norm and stays.
        dtype: of parameters and gradients.
        device: where the tensors live; the CPU by default.
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
        """Draw the numbers.

        Args:
            model: the shapes.
            params: draw the parameters; otherwise their memory is reserved and never touched.
            grads: draw the gradients; otherwise the parameters have none.
            clip_active: start with a limit of half the gradients' norm, which `tighten` lowers; otherwise the limit is
                twice the norm and stays.
            rows_reached: share of the rows that have a gradient; that of the others is zero.
            dtype: of parameters and gradients.
            device: where the tensors live; the CPU by default.
        """
        self.device = device or torch.device("cpu")
        generator = torch.Generator(self.device).manual_seed(0)

        def drawn(shape: tuple[int, ...], wanted: bool) -> Tensor:
            values = torch.empty(shape, dtype=dtype, device=self.device)
            return values.normal_(generator=generator) if wanted else values

        self._clip_active = clip_active
        # The norm of n standard normal numbers is sqrt(n) within a fraction of a per cent.
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
        """`max_norm` for the coming call."""
        return self.fraction * self._norm

    def tighten(self) -> None:
        """Lower the limit below the norm that the last clip left, if the clip is to stay on."""
        if self._clip_active:
            self.fraction *= _LIMIT_DECAY


Build = Callable[[Workload], Candidate]
# Called with a list of parameters and, for some peers, one of torch's `fused` / `foreach` switches.
MakeOptimizer = Callable[..., Any]


def both(
    ours: Callable[..., object],
    torchs: Callable[..., object],
    arguments: Callable[[Workload], tuple[Any, ...]],
) -> tuple[Build, Build]:
    """A function of steadygrad and torch's, which takes its foreach path on plain tensors, called alike."""

    def build(name: str, function: Callable[..., object]) -> Build:
        return lambda load: Candidate(name, lambda: function(*arguments(load)), load.tighten)

    return build(OURS, ours), build(TORCH_FOREACH, torchs)


def stabilizer_step(make: MakeOptimizer) -> Build:
    """steadygrad.Stabilizer around the torch optimizer that `make` builds."""
    return own_class_step(lambda params, max_norm: sg.Stabilizer(make(params), max_norm=max_norm))


def own_class_step(make: MakeOptimizer) -> Build:
    """A class of steadygrad.optim, which `make` builds from parameters and `max_norm`."""

    def build(load: Workload) -> Candidate:
        optimizer = make(load.params, max_norm=load.limit)

        def prepare() -> None:
            load.tighten()
            optimizer.param_groups[0]["max_norm"] = load.limit

        return Candidate(OURS, optimizer.step, prepare)

    return build


def clip_then_step(make: MakeOptimizer, name: str, **switches: bool) -> Build:
    """The usual pair: torch's clip_grad_norm_, then the step of the optimizer that `make` builds.

    `switches` are `fused=True` or `foreach=True`; without them torch takes its for-loop on CPUs and foreach on GPUs.
    """

    def build(load: Workload) -> Candidate:
        optimizer = make(load.params, **switches)

        def run() -> None:
            clip_grad_norm_(load.params, load.limit)
            optimizer.step()

        return Candidate(name, run, load.tighten)

    return build


def folded_step(make: MakeOptimizer) -> Build:
    """The strong peer: torch's fused step with the clip folded into `grad_scale`.

    The step divides by the `grad_scale` that a GradScaler sets, so max(1, norm / max_norm) clips without a pass of its
    own. torch's kernels write the divided gradients back. No `found_inf` is set: torch does without, and saves the
    launches that take the counted step back.
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
    """steadygrad.add_penalty_, then its peers: autograd on a term of the loss, the usual loop, foreach calls."""

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
    """steadygrad.soft_threshold_, then its peers: the textbook formula, and torch's softshrink copied back."""

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
    return lambda load: Candidate(name, lambda: call(load))
