"""A scheduler that reduces the learning rate after a bad step and lets it recover."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from steadygrad.arguments import checked_count, checked_number
from steadygrad.memory import is_asynchronous
from steadygrad.optim.stabilized import StabilizedOptimizer

# The number of calls from one look at the counters to the next, where reading them waits for a device.
_EVERY_ON_DEVICE = 16

# These are left out of the state dict: the optimizer and the other scheduler have state dicts of their own.
_NOT_SAVED = ("optimizer", "scheduler", "_groups")


class LRBackoff(LRScheduler):
    r"""Multiplies the learning rate by a factor :math:`m` that falls after a skipped step and then recovers.

    >>> opt = sg.optim.SGD(model.parameters(), lr=0.1, clip=sg.ClipZScore(), skip=sg.SkipSpikes())
    >>> scheduler = sg.LRBackoff(opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=1000))
    >>> opt.step()
    >>> scheduler.step()    # replaces the call of the other scheduler, which it steps itself

    A bad step is one that was skipped, for non-finite gradients or by ``skip=SkipSpikes()``, and with ``clipped=True``
    also one that was clipped. After a bad step :math:`m \leftarrow \max(\text{factor} \cdot m, \text{min\_factor})`.
    From there :math:`m` rises linearly and reaches 1 after ``recovery_steps`` calls.

    The scheduler reads nothing but counters. If steps are decided on a CUDA device, reading the counters waits for the
    device, so they are read at every 16th call only; several bad steps in between count as one.

    The scheduler sets the learning rates of all param groups. Groups may be added and removed. A group that is added
    while :math:`m` is less than 1 starts with its full rate, which the next call multiplies.

    The state dict holds the state of the other scheduler, too.

    Args:
        optimizer: A :class:`steadygrad.Stabilizer` or an optimizer of ``steadygrad.optim``.
        scheduler: Another scheduler of the same optimizer, whose rates are multiplied. None multiplies the rates that
            the param groups have now. Default: None.
        factor: The factor of one bad step, in (0, 1). Default: 0.5.
        recovery_steps: The number of calls until :math:`m` is 1 again, at least 1. Default: 100.
        min_factor: The smallest :math:`m`, in (0, 1]. Default: 1/64.
        clipped: Whether a clipped step is a bad one, for policies that clip nothing but spikes. Default: False.
        every: The number of calls from one look at the counters to the next, at least 1. None stands for 1, or for 16
            on a CUDA device. Default: None.

    Raises:
        TypeError: ``optimizer`` is not stabilized, ``scheduler`` is not a scheduler, or an argument is not a number.
        ValueError: An argument is out of range, or ``scheduler`` belongs to another optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None = None,
        *,
        factor: float = 0.5,
        recovery_steps: int = 100,
        min_factor: float = 1 / 64,
        clipped: bool = False,
        every: int | None = None,
    ) -> None:
        if not isinstance(optimizer, StabilizedOptimizer):
            raise TypeError(
                "LRBackoff: optimizer: expected a steadygrad.Stabilizer or one of steadygrad.optim, "
                f"got {type(optimizer).__name__}"
            )
        _check_scheduler(scheduler, optimizer)
        self.scheduler = scheduler
        self.factor = checked_number("LRBackoff: factor", factor, below=1.0)
        self.min_factor = checked_number("LRBackoff: min_factor", min_factor)
        if self.factor == 0 or not 0 < self.min_factor <= 1:
            name, value = ("factor", factor) if self.factor == 0 else ("min_factor", min_factor)
            raise ValueError(f"LRBackoff: {name}: expected a number > 0 and <= 1, got {value!r}")
        self.recovery_steps = checked_count("LRBackoff: recovery_steps", recovery_steps, low=1)
        self.clipped = bool(clipped)
        self.every = None if every is None else checked_count("LRBackoff: every", every, low=1)
        self.multiplier = 1.0
        self._lowest = 1.0
        self._since = 0
        super().__init__(optimizer)

    def _initial_step(self) -> None:
        self._step_count, self.last_epoch = 1, 0
        self._seen = self._bad_steps()
        self._groups = list(self.optimizer.param_groups)
        self._scheduled = [_copied(group["lr"]) for group in self._groups]
        self._last_lr = [_copied(lr) for lr in self._scheduled]

    def get_lr(self) -> list[Any]:
        """Returns the scheduled rates times the factor :math:`m`."""
        return [lr * self.multiplier for lr in self._scheduled]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the other scheduler with the arguments and sets the rates; call it after the optimizer's step."""
        self._step_count += 1
        self.last_epoch += 1
        groups = self.optimizer.param_groups
        self._follow_groups()
        if self.scheduler is not None:
            # Most schedulers compute the next rate from the one in the group, so they have to find their own there.
            for group, lr in zip(groups, self._scheduled, strict=True):
                _set_rate(group, lr)
            self.scheduler.step(*args, **kwargs)
            self._scheduled = [_copied(group["lr"]) for group in groups]
        self._look()
        for group, lr in zip(groups, self.get_lr(), strict=True):
            _set_rate(group, lr)
        self._last_lr = [_copied(group["lr"]) for group in groups]

    def _follow_groups(self) -> None:
        """Takes up the rates of param groups that were added since the last call, and drops those of removed groups."""
        groups = self.optimizer.param_groups
        places = {id(group): place for place, group in enumerate(self._groups)}
        if not any(id(group) in places for group in groups):
            # A loaded state dict replaces all groups by others in the same order.
            places = {id(group): i for i, group in enumerate(groups[: len(self._scheduled)])}
        self._scheduled = [
            self._scheduled[places[id(group)]] if id(group) in places else _copied(group["lr"])
            for group in groups
        ]
        self._groups = list(groups)

    def _look(self) -> None:
        self._since = min(self._since + 1, self.recovery_steps)
        share = self._since / self.recovery_steps
        self.multiplier = self._lowest + (1 - self._lowest) * share
        if self.last_epoch % self._interval() != 0:
            return
        bad_steps = self._bad_steps()
        if bad_steps > self._seen:
            self._lowest = max(self.multiplier * self.factor, self.min_factor)
            self.multiplier, self._since = self._lowest, 0
        self._seen = bad_steps

    def _interval(self) -> int:
        if self.every is not None:
            return self.every
        first = next((p for group in self.optimizer.param_groups for p in group["params"]), None)
        return _EVERY_ON_DEVICE if first is not None and is_asynchronous(first.device) else 1

    def _bad_steps(self) -> int:
        assert isinstance(self.optimizer, StabilizedOptimizer)
        clipped = self.optimizer.clipped_steps if self.clipped else 0
        return self.optimizer.skipped_steps + clipped

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of this scheduler, and under ``"scheduler"`` that of the other one."""
        own = {k: v for k, v in self.__dict__.items() if k not in _NOT_SAVED}
        inner = None if self.scheduler is None else self.scheduler.state_dict()
        return {**own, "scheduler": inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of both schedulers; load the optimizer first, since its counters are compared."""
        own = dict(state_dict)
        inner = own.pop("scheduler", None)
        if (inner is None) != (self.scheduler is None):
            expected = "no other scheduler" if self.scheduler is None else "another scheduler's"
            raise ValueError(
                f"LRBackoff.load_state_dict: state_dict['scheduler']: expected {expected} state, got "
                f"{type(inner).__name__}"
            )
        _check_loaded(own)
        self.__dict__.update(own)
        self._groups = self.optimizer.param_groups[: len(self._scheduled)]
        if self.scheduler is not None and inner is not None:
            self.scheduler.load_state_dict(inner)


def _check_loaded(own: dict[str, Any]) -> None:
    """Refuses out-of-range counters and multipliers before any of them is loaded."""
    for key in ("multiplier", "_lowest", "factor", "min_factor"):
        where = f"LRBackoff.load_state_dict: state_dict[{key!r}]"
        if key in own and not 0 < checked_number(where, own[key]) <= 1:
            raise ValueError(f"{where}: expected a number > 0 and <= 1, got {own[key]!r}")
    for key, low in (("recovery_steps", 1), ("_since", 0), ("_seen", 0), ("every", 1)):
        if own.get(key) is not None or (key in own and key != "every"):
            checked_count(f"LRBackoff.load_state_dict: state_dict[{key!r}]", own[key], low=low)


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, LRBackoff):
        raise TypeError(
            "LRBackoff: scheduler: expected one of torch.optim.lr_scheduler or None, "
            f"got {type(scheduler).__name__}"
        )
    if scheduler.optimizer not in (optimizer, getattr(optimizer, "optimizer", optimizer)):
        raise ValueError(
            "LRBackoff: scheduler: expected one of the same optimizer, got one of another "
            f"{type(scheduler.optimizer).__name__}"
        )


def _copied(lr: Any) -> Any:
    return lr.clone() if isinstance(lr, Tensor) else lr


def _set_rate(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):  # a captured graph reads this very tensor
        group["lr"].fill_(lr) if not isinstance(lr, Tensor) else group["lr"].copy_(lr)
    else:
        group["lr"] = lr
