"""Steps as torch's hooks and profiler see them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from steadygrad.optim.closures import Closure


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook or a profiler would see its step; without, a step does without the time that it takes to ask."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or profiler._is_profiler_enabled
    )


def run_hooked(
    optimizer: torch.optim.Optimizer,
    step: Callable[[Closure | None], tuple[Any, bool]],
    closure: Closure | None,
) -> Any:
    """A step between the optimizer's hooks, as ``torch.optim.Optimizer.profile_hook_step`` has it.

    Args:
        optimizer: whose hooks run.
        step: is given the closure, and returns its loss and whether the step was taken: post-hooks run only then.
        closure: which pre-hooks may replace.

    Raises:
        RuntimeError: a pre-hook returned something else than None or a pair of arguments.
    """
    args: tuple[Any, ...] = (optimizer,) if closure is None else (optimizer, closure)
    kwargs: dict[str, Any] = {}
    with profiler.record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
        for pre_hook in chain(
            list(_global_optimizer_pre_hooks.values()),
            list(optimizer._optimizer_step_pre_hooks.values()),
        ):
            changed = pre_hook(optimizer, args, kwargs)
            if changed is None:
                continue
            if not (isinstance(changed, tuple) and len(changed) == 2):
                raise RuntimeError(
                    "step: pre-hooks: expected None or a tuple of (new_args, new_kwargs), "
                    f"got {changed!r} from {pre_hook!r}"
                )
            args, kwargs = changed
        loss, taken = step(args[1] if len(args) > 1 else kwargs.get("closure"))
        # Where a profiler that traces Python looks at the optimizer.
        optimizer._optimizer_step_code()
        if taken:
            for post_hook in chain(
                list(optimizer._optimizer_step_post_hooks.values()),
                list(_global_optimizer_post_hooks.values()),
            ):
                post_hook(optimizer, args, kwargs)
    return loss
