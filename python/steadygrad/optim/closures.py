"""Closures: evaluated before a step, or by optimizers that evaluate the model themselves."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch

Closure = Callable[[], Any]


def evaluates_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step calls the closure by itself, more than once, as LBFGS does: then it cannot do without."""
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def other_update_methods(optimizer: torch.optim.Optimizer) -> list[str]:
    """Public methods beside ``step`` that can be called as it is, such as ``first_step`` and ``second_step`` of SAM."""
    kind = type(optimizer)
    names = [name for name in dir(kind) if name.endswith("_step") and not name.startswith("_")]
    return [
        name
        for name in names
        if not hasattr(torch.optim.Optimizer, name)
        and inspect.isfunction(getattr(kind, name))
        and _can_do_without_arguments(getattr(kind, name))
    ]


def _can_do_without_arguments(method: Callable[..., Any]) -> bool:
    # What needs arguments, as ``update_step`` of bitsandbytes, is a part of the step.
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return all(p.kind in optional or p.default is not p.empty for p in parameters)


def evaluated(closure: Closure | None) -> Any:
    """The closure's loss, evaluated with gradients enabled; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def snapshot(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that puts the parameters and the state back as they are now."""
    params = [(p, p.detach().clone()) for g in optimizer.param_groups for p in g["params"]]
    state = {p: copy.deepcopy(values) for p, values in optimizer.state.items()}

    @torch.no_grad()
    def restore() -> None:
        for param, value in params:
            param.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(state)

    return restore
