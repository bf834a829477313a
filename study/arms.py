"""What a remedy is, and how it gets into a training run."""

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
        ValueError: it is empty, or no line of text.
    """
    if not name or not name.isprintable():
        raise ValueError(f"{what}: name: expected printable characters on one line, got {name!r}")


@dataclass(frozen=True)
class Arm:
    """One remedy. What is left out stays as it is without a remedy.

    Raises:
        ValueError: ``by="torch"`` with a policy of ours, or a name that is no line of text.
    """

    name: str  # how tables, plots and files call it
    remedy: str = "none"  # the family it belongs to
    about: str = ""  # what it does, in a few words
    max_norm: float | None = None  # limit of the global gradient norm
    clip_value: float | None = None  # limit of every element of the gradient
    clip: Policy | None = None  # finds the limit
    skip: SkipSpikes | None = None  # leaves out steps whose norm is a spike
    l1: float = 0.0  # factor of sum |p| in the loss
    l2: float = 0.0  # factor of sum p^2 / 2 in the loss
    weight_decay: float = 0.0  # of the optimizer; after the clip, where l2 comes before it
    model: Mapping[str, Any] = field(default_factory=dict)  # fields of the model, replaced
    task: Callable[[Task], Task] | None = None  # what becomes of the data
    schedule: Schedule | None = None  # of the optimizer and the number of steps
    accumulate: int = 1  # micro-batches of the problem's batch size per step
    # Evaluations without progress on held-out training data after which training stops; the
    # parameters are then those of the best one.
    early_stopping: int = 0
    by: Literal["steadygrad", "torch"] = "steadygrad"  # whose clipping, penalties, accumulation
    twin: str | None = None  # the arm of ours that this one repeats with torch's own functions

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
    ) -> OurStepper | TorchStepper:
        """Make SGD with this remedy in front of it.

        Non-finite gradients are applied as torch applies them (``nonfinite="propagate"``) in every
        arm: an explosion is seen and not skipped over, and what an arm gains is due to its remedy.
        """
        groups: Any = parameters
        if isinstance(self.clip, ClipAdaptive):
            # The last layer, weight and bias, is not clipped, as in the paper.
            groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "clipping": None}]
        sgd = torch.optim.SGD(
            groups, lr=learning_rate, momentum=momentum, weight_decay=self.weight_decay
        )
        return TorchStepper(sgd, parameters, self) if self.by == "torch" else OurStepper(sgd, self)

    def describe(self) -> dict[str, Any]:
        """Return name, remedy and all that differs from no remedy, as JSON values."""
        named = ("name", "remedy", "about", "by", "twin")
        settings = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name not in named and value and value != item.default:
                plain = dict(value) if isinstance(value, Mapping) else repr(value)
                settings[item.name] = getattr(value, "__name__", None) or plain
        described = {name: getattr(self, name) for name in named}
        return {**described, "limit": self.max_norm, "settings": settings}


class OurStepper:
    """Steps of a :class:`steadygrad.Stabilizer`."""

    def __init__(self, sgd: torch.optim.SGD, arm: Arm) -> None:
        remedies: Any = {name: getattr(arm, name) for name in _OF_THE_STEP}
        self.optimizer = Stabilizer(sgd, **remedies, nonfinite="propagate")

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss: nothing, since penalties are part of the step."""
        return None

    def step(self) -> None:
        """Clip, penalise and update."""
        self.optimizer.step()

    @property
    def clipped_steps(self) -> int:
        return self.optimizer.clipped_steps

    @property
    def skipped_steps(self) -> int:
        return self.optimizer.skipped_steps

    @property
    def grad_norm(self) -> float:
        """Norm before the clip, of the last step."""
        return self.optimizer.grad_norm.item()


class TorchStepper:
    """The same with ``torch.nn.utils`` and penalties in the loss, as one would write it by hand."""

    def __init__(self, sgd: torch.optim.SGD, parameters: Sequence[nn.Parameter], arm: Arm) -> None:
        self.optimizer = sgd
        self.clipped_steps = self.skipped_steps = 0
        self.grad_norm: float | None = None
        self._parameters, self._arm = parameters, arm

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss."""
        terms = []
        if self._arm.l1:
            terms.append(self._arm.l1 * sum(p.abs().sum() for p in self._parameters))
        if self._arm.l2:
            terms.append(0.5 * self._arm.l2 * sum(p.square().sum() for p in self._parameters))
        return None if not terms else torch.as_tensor(sum(terms))

    def step(self) -> None:
        """Clip and update."""
        if self._arm.max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, self._arm.max_norm)
            self.grad_norm = norm.item()
            self.clipped_steps += self.grad_norm > self._arm.max_norm
        if self._arm.clip_value is not None:
            nn.utils.clip_grad_value_(self._parameters, self._arm.clip_value)
        self.optimizer.step()
