"""What people use today: torch's functions and optimizers, or the usual loops where it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softshrink
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from benchmarks.timer import Candidate
from benchmarks.workload import Workload

TORCH_FOREACH = "torch foreach"
CLIP_FUSED = "torch clip + fused"
CLIP_DEFAULT = "torch clip + default"
CLIP_FOREACH = "torch clip + foreach"
FUSED_FOLDED = "torch fused, grad_scale"

# Called with a list of parameters and, for some peers, one of torch's `fused` / `foreach` switches.
MakeOptimizer = Callable[..., Any]


def torch_clip_grad_norm(load: Workload) -> Candidate:
    """torch.nn.utils.clip_grad_norm_, which takes its foreach path on plain tensors."""
    params = load.params
    return Candidate(TORCH_FOREACH, lambda: clip_grad_norm_(params, load.limit), load.tighten)


def torch_get_total_norm(load: Workload) -> Candidate:
    """torch.nn.utils.get_total_norm over the gradients."""
    grads = load.grads
    return Candidate(TORCH_FOREACH, lambda: get_total_norm(grads))


def torch_clip_grad_value(load: Workload) -> Candidate:
    """torch.nn.utils.clip_grad_value_, one pass for each of the two bounds."""
    params = load.params
    return Candidate(TORCH_FOREACH, lambda: clip_grad_value_(params, load.fraction), load.tighten)


def clip_then_step(
    make: MakeOptimizer, name: str, **switches: bool
) -> Callable[[Workload], Candidate]:
    """The usual pair: torch's clip_grad_norm_, then the optimizer's own step.

    Args:
        make: builds the optimizer from a list of parameters.
        name: what the tables call this peer.
        **switches: `fused=True` or `foreach=True`; without them torch takes its for-loop on CPUs
            and foreach on GPUs.
    """

    def build(load: Workload) -> Candidate:
        params = load.params
        optimizer = make(params, **switches)

        def run() -> None:
            clip_grad_norm_(params, load.limit)
            optimizer.step()

        return Candidate(name, run, load.tighten)

    return build


def folded_step(make: MakeOptimizer) -> Callable[[Workload], Candidate]:
    """The strong peer: torch's fused step with the clip folded into `grad_scale`.

    The step divides by the `grad_scale` that a GradScaler sets, so max(1, norm / max_norm) clips
    without a pass of its own. torch's kernels write the divided gradients back. No `found_inf` is
    set: torch does without, and saves the launches that take the counted step back.
    """

    def build(load: Workload) -> Candidate:
        grads = load.grads
        optimizer = make(load.params, fused=True)

        def run() -> None:
            norm = get_total_norm(grads)
            optimizer.grad_scale = ((norm + 1e-6) / load.limit).clamp_(min=1.0)
            optimizer.step()

        return Candidate(FUSED_FOLDED, run, load.tighten)

    return build


def autograd_penalty(l1: float, l2: float) -> Callable[[Workload], Candidate]:
    """The penalty as a term of the loss, differentiated by autograd into the gradients."""

    def build(load: Workload) -> Candidate:
        params = load.params

        def run() -> Tensor:
            penalty = torch.zeros((), device=load.device)
            for param in params:
                penalty = penalty + l1 * param.abs().sum() + 0.5 * l2 * param.square().sum()
            penalty.backward()
            return penalty

        return Candidate("torch autograd", run)

    return build


def loop_penalty(l1: float, l2: float) -> Callable[[Workload], Candidate]:
    """The usual loop: the penalty's gradient added to each `.grad`, its value summed beside it."""

    def build(load: Workload) -> Candidate:
        pairs = list(zip(load.params, load.grads, strict=True))

        @torch.no_grad()
        def run() -> Tensor:
            penalty = torch.zeros((), device=load.device)
            for param, grad in pairs:
                grad.add_(param.sign(), alpha=l1).add_(param, alpha=l2)
                penalty += l1 * param.abs().sum() + 0.5 * l2 * param.square().sum()
            return penalty

        return Candidate("torch loop", run)

    return build


def foreach_penalty(l1: float, l2: float) -> Callable[[Workload], Candidate]:
    """The same in foreach calls: fewer calls from Python, the same passes over memory."""

    def build(load: Workload) -> Candidate:
        params: list[Tensor] = list(load.params)
        grads = load.grads

        @torch.no_grad()
        def run() -> Tensor:
            torch._foreach_add_(grads, torch._foreach_sign(params), alpha=l1)
            torch._foreach_add_(grads, params, alpha=l2)
            absolute = torch.stack(torch._foreach_norm(params, 1)).sum()
            squared = torch.stack(torch._foreach_norm(params, 2)).square().sum()
            return l1 * absolute + 0.5 * l2 * squared

        return Candidate(TORCH_FOREACH, run)

    return build


def composite_threshold(amount: float) -> Callable[[Workload], Candidate]:
    """The textbook formula, one torch call per operation in it."""

    def build(load: Workload) -> Candidate:
        params = load.params

        @torch.no_grad()
        def run() -> None:
            for param in params:
                param.copy_(param.sign() * (param.abs() - amount).clamp_(min=0.0))

        return Candidate("torch sign * clamp", run)

    return build


def softshrink_threshold(amount: float) -> Callable[[Workload], Candidate]:
    """The same function out of place, torch's softshrink, copied back."""

    def build(load: Workload) -> Candidate:
        params = load.params

        @torch.no_grad()
        def run() -> None:
            for param in params:
                param.copy_(softshrink(param, amount))

        return Candidate("torch softshrink", run)

    return build
