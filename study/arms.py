"""Declare what a remedy is, and put it into a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from steadygrad import ClipAdaptive, SkipSpikes, Stabilizer
from steadygrad.policies import ClipPolicy as Policy

from .tasks import Task

_OF_THE_STEP = ("max_norm", "clip", "clip_value", "skip", "l1", "l2")
Schedule = Callable[[torch.optim.Optimizer, int], LRScheduler]


def check_name(what: str, name: str) -> None:
    """Check a name, which becomes a cell of tables and part of the names of files.

    Raises:
        ValueError: It is empty or holds characters that cannot be printed on one line.
    """
    if not name or not name.isprintable():
        raise ValueError(f"{what}: name: expected printable characters on one line, got {name!r}")


def not_default(declaration: Any) -> dict[str, Any]:
    """Return the fields of a declaration that are not at their defaults."""
    values = {item: getattr(declaration, item.name) for item in dataclasses.fields(declaration)}
    return {item.name: value for item, value in values.items() if value != item.default}


@dataclass(frozen=True)
class Arm:
    """Declares one remedy; a field at its default leaves training as it is without a remedy.

    Raises:
        ValueError: ``by="torch"`` is combined with ``clip`` or ``skip``, or the name cannot be printed
            on one line.
    """

    name: str  # name in tables, plots and files
    remedy: str = "none"  # family of remedies that it belongs to
    about: str = ""  # what it does, in a few words
    max_norm: float | None = None  # limit of the global gradient norm
    clip_value: float | None = None  # limit of every element of the gradient
    clip: Policy | None = None  # policy that finds the limit of the norm
    skip: SkipSpikes | None = None  # policy that leaves out steps whose norm is a spike
    l1: float = 0.0  # weight of sum |p| in the loss
    l2: float = 0.0  # weight of sum p^2 / 2 in the loss
    weight_decay: float = 0.0  # weight decay of the optimizer, added after the clip
    model: Mapping[str, Any] = field(default_factory=dict)  # fields of the model that are replaced
    task: Callable[[Task], Task] | None = None  # makes another task of the problem's
    schedule: Schedule | None = None  # makes a scheduler
    accumulate: int = 1  # micro-batches of the problem's batch size per step
    # Training stops after this many evaluations without progress on held-out training data, and
    # keeps the parameters of the best evaluation; 0 never stops early.
    early_stopping: int = 0
    by: Literal["steadygrad", "torch"] = "steadygrad"  # who clips, penalises, accumulates
    twin: str | None = None  # name of the steadygrad arm that this one repeats in torch

    def __post_init__(self) -> None:
        check_name("Arm", self.name)
        if self.by == "torch" and (self.clip is not None or self.skip is not None):
            raise ValueError(f"Arm {self.name!r}: by: expected 'steadygrad' with clip= or skip=")

    def by_torch(self, **changes: Any) -> Arm:
        """Return the same remedy with torch's own functions, as the twin of this arm."""
        return dataclasses.replace(
            self, name=f"{self.name} (torch)", by="torch", twin=self.name, **changes
        )

    def stepper(
        self, parameters: Sequence[nn.Parameter], learning_rate: float, momentum: float
    ) -> Stabilizer | TorchStepper:
        """Make SGD with this remedy in front of it."""
        groups: Any = parameters
        if isinstance(self.clip, ClipAdaptive):
            # As in the paper, weight and bias of the last layer are not clipped.
            groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "clipping": None}]
        sgd = torch.optim.SGD(
            groups, lr=learning_rate, momentum=momentum, weight_decay=self.weight_decay
        )
        return TorchStepper(sgd, parameters, self) if self.by == "torch" else self.stabilized(sgd)

    def stabilized(self, optimizer: torch.optim.Optimizer) -> Stabilizer:
        """Put this remedy in front of an optimizer.

        Every arm applies non-finite gradients as torch does (``nonfinite="propagate"``), so that an
        explosion is recorded and not skipped, and what an arm gains is due to its remedy alone.
        """
        remedies: Any = {name: getattr(self, name) for name in _OF_THE_STEP}
        return Stabilizer(optimizer, **remedies, nonfinite="propagate")

    def describe(self) -> dict[str, Any]:
        """Return the name, the remedy and every field that is not at its default, as JSON values."""
        named = ("name", "remedy", "about", "by", "twin")
        settings = {}
        for name, value in not_default(self).items():
            if name not in named and value:
                plain = dict(value) if isinstance(value, Mapping) else repr(value)
                settings[name] = getattr(value, "__name__", None) or plain
        described = {name: getattr(self, name) for name in named}
        return {**described, "limit": self.max_norm, "settings": settings}


class TorchStepper:
    """Makes the steps of an arm as one would by hand in torch, with penalties in the loss."""

    def __init__(self, sgd: torch.optim.SGD, parameters: Sequence[nn.Parameter], arm: Arm) -> None:
        self.optimizer = sgd
        self.clipped_steps = self.skipped_steps = 0
        self.grad_norm: Tensor | None = None  # before the clip
        self._parameters, self._arm = parameters, arm

    def penalty(self) -> Tensor | None:
        """Return the penalty to add to the loss, None if the arm has none."""
        terms = []
        if self._arm.l1:
            terms.append(self._arm.l1 * sum(p.abs().sum() for p in self._parameters))
        if self._arm.l2:
            terms.append(0.5 * self._arm.l2 * sum(p.square().sum() for p in self._parameters))
        return None if not terms else torch.as_tensor(sum(terms))

    def step(self) -> None:
        """Clip and update."""
        if self._arm.max_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self._parameters, self._arm.max_norm)
            self.clipped_steps += self.grad_norm.item() > self._arm.max_norm
        if self._arm.clip_value is not None:
            nn.utils.clip_grad_value_(self._parameters, self._arm.clip_value)
        self.optimizer.step()
