"""A scheduler that takes the learning rate back after a bad step and lets it recover."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from steadygrad.arguments import checked_count, checked_number
from steadygrad.memory import is_asynchronous
from steadygrad.optim.stabilized import StabilizedOptimizer

# How often counters are looked at where that waits for a device.
_EVERY_ON_DEVICE = 16

# Others save these by themselves.
_NOT_SAVED = ("optimizer", "scheduler", "_groups")


class LRBackoff(LRScheduler):
    r"""Multiplies the learning rate by a factor :math:`m` that falls after a skipped step and then recovers.

    >>> opt = sg.optim.SGD(model.parameters(), lr=0.1, clip=sg.ClipZScore(), skip=sg.SkipSpikes())
    >>> scheduler = sg.LRBackoff(opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=1000))
    >>> opt.step()
    >>> scheduler.step()    # in the place of the other one, which it steps

    A bad step is one that was skipped, for non-finite gradients or by ``skip=SkipSpikes()``, and with ``clipped=True``
    also one that was clipped. After it :math:`m \leftarrow \max(\text{factor} \cdot m, \text{min\_factor})`; from
    there it rises in a straight line and is 1 again ``recovery_steps`` calls later.

    Only counters are read. Where steps are decided on a CUDA device reading them waits for it, so there they are looked
    at every 16 calls; bad steps between two looks count as one.

    Args:
        optimizer: a :class:`steadygrad.Stabilizer` or one of ``steadygrad.optim``.
        scheduler: of the same optimizer; its rates are multiplied. None: those that the param groups have now.
            Default: None.
        factor: in (0, 1). Default: 0.5.
        recovery_steps: calls, at least 1. Default: 100.
        min_factor: the least :math:`m`, in (0, 1]. Default: 1/64.
        clipped: whether a clipped step is a bad one: for policies that clip spikes only. Default: False.
        every: calls from one look at the counters to the next, at least 1; None: 1, or 16 on a CUDA device.
            Default: None.

    The rates of the param groups are this scheduler's to set. Groups may be added and removed; one that is added while
    :math:`m` is less than 1 comes with its full rate, which the next call multiplies.

    Its state dict holds that of the other scheduler.

    Raises:
        TypeError: ``optimizer`` is not stabilized, ``scheduler`` is none, or an argument is no number.
        ValueError: an argument is out of range, or ``scheduler`` is that of another optimizer.
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
        """The scheduled rates, multiplied."""
        return [lr * self.multiplier for lr in self._scheduled]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """To be called after the optimizer's step; arguments go to the other scheduler."""
        self._step_count += 1
        self.last_epoch += 1
        groups = self.optimizer.param_groups
        self._follow_groups()
        if self.scheduler is not None:
            # Most schedulers go on from the rates that they find.
            for group, lr in zip(groups, self._scheduled, strict=True):
                _set_rate(group, lr)
            self.scheduler.step(*args, **kwargs)
            self._scheduled = [_copied(group["lr"]) for group in groups]
        self._look()
        for group, lr in zip(groups, self.get_lr(), strict=True):
            _set_rate(group, lr)
        self._last_lr = [_copied(group["lr"]) for group in groups]

    def _follow_groups(self) -> None:
        """Param groups that were added since have the rates they came with; those that are gone need none."""
        groups = self.optimizer.param_groups
        places = {id(group): place for place, group in enumerate(self._groups)}
        if not any(id(group) in places for group in groups):
            # A loaded state dict puts others into their places.
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
        """Its own state, and under ``"scheduler"`` the other scheduler's."""
        own = {k: v for k, v in self.__dict__.items() if k not in _NOT_SAVED}
        inner = None if self.scheduler is None else self.scheduler.state_dict()
        return {**own, "scheduler": inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads both; load the optimizer's first, as its counters are compared with."""
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
    """Refuses counters and multipliers that no call could go on from, before any of them is loaded."""
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
    if isinstance(group["lr"], Tensor):  # a captured graph reads this one
        group["lr"].fill_(lr) if not isinstance(lr, Tensor) else group["lr"].copy_(lr)
    else:
        group["lr"] = lr
