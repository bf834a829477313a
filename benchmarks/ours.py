"""steadygrad's side of every race."""

from __future__ import annotations

from collections.abc import Callable

import steadygrad as sg
from benchmarks.peers import MakeOptimizer
from benchmarks.timer import Candidate
from benchmarks.workload import Workload

OURS = "steadygrad"


def clip_grad_norm(load: Workload) -> Candidate:
    """steadygrad.clip_grad_norm_."""
    params = load.params
    return Candidate(OURS, lambda: sg.clip_grad_norm_(params, load.limit), load.tighten)


def get_total_norm(load: Workload) -> Candidate:
    """steadygrad.get_total_norm."""
    grads = load.grads
    return Candidate(OURS, lambda: sg.get_total_norm(grads))


def clip_grad_value(load: Workload) -> Candidate:
    """steadygrad.clip_grad_value_."""
    params = load.params
    return Candidate(OURS, lambda: sg.clip_grad_value_(params, load.fraction), load.tighten)


def _stepping(make: MakeOptimizer, load: Workload) -> Candidate:
    optimizer = make(load.params)

    def prepare() -> None:
        load.tighten()
        optimizer.param_groups[0]["max_norm"] = load.limit

    return Candidate(OURS, optimizer.step, prepare)


def stabilizer_step(make: MakeOptimizer) -> Callable[[Workload], Candidate]:
    """steadygrad.Stabilizer around the torch optimizer that `make` builds."""

    def build(load: Workload) -> Candidate:
        return _stepping(lambda params: sg.Stabilizer(make(params), max_norm=load.limit), load)

    return build


def own_class_step(make: MakeOptimizer) -> Callable[[Workload], Candidate]:
    """A class of steadygrad.optim, which `make` builds from parameters and `max_norm`."""

    def build(load: Workload) -> Candidate:
        return _stepping(lambda params: make(params, max_norm=load.limit), load)

    return build


def add_penalty(l1: float, l2: float) -> Callable[[Workload], Candidate]:
    """steadygrad.add_penalty_."""

    def build(load: Workload) -> Candidate:
        params = load.params
        return Candidate(OURS, lambda: sg.add_penalty_(params, l1=l1, l2=l2))

    return build


def soft_threshold(amount: float) -> Callable[[Workload], Candidate]:
    """steadygrad.soft_threshold_."""

    def build(load: Workload) -> Candidate:
        params = load.params
        return Candidate(OURS, lambda: sg.soft_threshold_(params, amount))

    return build
