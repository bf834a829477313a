"""A step that torch's hooks and profiler see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch

from steadygrad.optim.closures import Closure


def hooked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a bound method as torch wraps an optimizer's ``step``, without keeping the method's object alive."""
    weak_method = WeakMethod(method)

    def step(optimizer: torch.optim.Optimizer, closure: Closure | None = None) -> Any:
        bound = weak_method()
        assert bound is not None  # its object has called
        return bound(optimizer, closure)

    return torch.optim.Optimizer.profile_hook_step(step)
