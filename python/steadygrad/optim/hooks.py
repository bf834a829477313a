"""Runs torch's hooks and profiler around a step, and warns of steps that bypass the wrapper."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from steadygrad.optim.in_place import Closure


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether hooks or a profiler observe the step; other steps save the time of running them."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or profiler._is_profiler_enabled
    )


def run_pre_hook(
    pre_hook: Callable[..., Any], optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Calls a pre-hook of a step, and returns the step's arguments, which the hook may replace.

    Raises:
        RuntimeError: The hook returned something other than None or a pair of arguments.
    """
    changed = pre_hook(optimizer, args, kwargs)
    if changed is None:
        return args, kwargs
    if not (isinstance(changed, tuple) and len(changed) == 2):
        raise RuntimeError(
            "step: pre-hooks: expected None or a tuple of (new_args, new_kwargs), "
            f"got {changed!r} from {pre_hook!r}"
        )
    return changed


def run_hooked(
    optimizer: torch.optim.Optimizer,
    step: Callable[[Closure | None], tuple[Any, bool]],
    closure: Closure | None,
) -> Any:
    """Runs a step between the optimizer's hooks, as ``torch.optim.Optimizer.profile_hook_step`` does.

    Args:
        optimizer: The optimizer whose hooks run.
        step: A function that takes the closure, and returns its loss and whether the step was taken; post-hooks run
            only if it was.
        closure: The closure, which pre-hooks may replace.

    Raises:
        RuntimeError: A pre-hook returned something other than None or a pair of arguments.
    """
    args: tuple[Any, ...] = (optimizer,) if closure is None else (optimizer, closure)
    kwargs: dict[str, Any] = {}
    with profiler.record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
        for pre_hook in chain(
            list(_global_optimizer_pre_hooks.values()),
            list(optimizer._optimizer_step_pre_hooks.values()),
        ):
            args, kwargs = run_pre_hook(pre_hook, optimizer, args, kwargs)
        loss, taken = step(args[1] if len(args) > 1 else kwargs.get("closure"))
        # A profiler that traces Python observes the optimizer in this call.
        optimizer._optimizer_step_code()
        if taken:
            for post_hook in chain(
                list(optimizer._optimizer_step_post_hooks.values()),
                list(_global_optimizer_post_hooks.values()),
            ):
                post_hook(optimizer, args, kwargs)
    return loss


class _WatchedStep:
    """Replaces the ``step`` of one wrapped optimizer, as an attribute of that object.

    The fused path never calls it, so watching costs nothing there. It keeps no object alive.

    Args:
        optimizer: The wrapped optimizer.
        step: The step that a scheduler had put on the optimizer before; None for the step of its class.
    """

    # A scheduler for the wrapped optimizer would put a step of its own here; the mark says that this one does its part.
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
                "give schedulers, scalers and trainers the Stabilizer instead of the optimizer",
                stacklevel=2,
            )
        optimizer._opt_called = True
        if self._step is not None:
            return self._step(*args, **kwargs)
        return type(optimizer).step(optimizer, *args, **kwargs)


_watched: WeakKeyDictionary[torch.optim.Optimizer, _WatchedStep] = WeakKeyDictionary()


def watch(wrapper: torch.optim.Optimizer, optimizer: torch.optim.Optimizer) -> None:
    """Makes the step of a wrapped optimizer warn, once, if anything but a wrapper calls it.

    A step that something else has put on the object stays as it is, and is not watched.
    """
    step = vars(optimizer).get("step")
    if step is None or hasattr(step, "_wrapped_by_lr_sched"):
        if not isinstance(step, _WatchedStep):
            step = _watched[optimizer] = _WatchedStep(optimizer, step)
            vars(optimizer)["step"] = step
        step.wrappers.add(wrapper)


def own_step(optimizer: torch.optim.Optimizer, *closure: Callable[[], Any]) -> Any:
    """Calls the wrapped optimizer's own step on behalf of its wrapper."""
    watched = _watched.get(optimizer)
    if watched is None:
        return optimizer.step(*closure)
    watched.is_expected = True
    try:
        return optimizer.step(*closure)
    finally:
        watched.is_expected = False
