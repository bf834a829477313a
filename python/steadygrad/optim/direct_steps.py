"""Steps of a wrapped optimizer that are called past its wrapper: nothing stabilizes them, so they are warned about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch


class _WatchedStep:
    """Stands for the ``step`` of one wrapped optimizer, as an attribute of that object.

    The fused path never calls it, so that watching costs nothing there. It keeps nothing alive.

    Args:
        optimizer: the wrapped one.
        step: what a scheduler had put in the place of the optimizer's step before; None for the step of its class.
    """

    # A scheduler that is made for the wrapped optimizer would put a step of its own here; this one does its part.
    _wrapped_by_lr_sched = True

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[..., Any] | None) -> None:
        self._optimizer = ref(optimizer)
        self._step = step
        self._warned = False
        self.wrappers: WeakSet[torch.optim.Optimizer] = WeakSet()
        self.is_expected = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = self._optimizer()
        if not (self.is_expected or self._warned) and self.wrappers:
            self._warned = True
            warnings.warn(
                f"{type(optimizer).__name__}.step: called on the optimizer that a steadygrad.Stabilizer wraps: such "
                "steps are not stabilized, nothing is clipped, penalised or checked. Call step of the Stabilizer, and "
                "give it to schedulers, scalers and trainers in the place of the optimizer",
                stacklevel=2,
            )
        optimizer._opt_called = True
        if self._step is not None:
            return self._step(*args, **kwargs)
        return type(optimizer).step(optimizer, *args, **kwargs)


_watched: WeakKeyDictionary[torch.optim.Optimizer, _WatchedStep] = WeakKeyDictionary()


def watch(wrapper: torch.optim.Optimizer, optimizer: torch.optim.Optimizer) -> None:
    """Lets the step of a wrapped optimizer warn, once, where something else than a wrapper calls it.

    A step that somebody else had put on the object before stays as it is, and is not watched.
    """
    step = vars(optimizer).get("step")
    if step is None or hasattr(step, "_wrapped_by_lr_sched"):
        if not isinstance(step, _WatchedStep):
            step = _watched[optimizer] = _WatchedStep(optimizer, step)
            vars(optimizer)["step"] = step
        step.wrappers.add(wrapper)


def own_step(optimizer: torch.optim.Optimizer, *closure: Callable[[], Any]) -> Any:
    """Calls the wrapped optimizer's own step for its wrapper."""
    watched = _watched.get(optimizer)
    if watched is None:
        return optimizer.step(*closure)
    watched.is_expected = True
    try:
        return optimizer.step(*closure)
    finally:
        watched.is_expected = False
