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

    Attributes:
        name: how tables, plots and files call it.
        remedy: the family it belongs to.
        about: what it does, in a few words.
        max_norm: limit of the global gradient norm.
        clip_value: limit of every element of the gradient.
        clip: a policy that finds the limit.
        skip: leaves out steps whose norm is a spike.
        l1: factor of ``sum |p|`` in the loss.
        l2: factor of ``sum p^2 / 2`` in the loss.
        weight_decay: of the optimizer; after the clip, where ``l2`` comes before it.
        model: fields of the problem's model that are replaced.
        task: what becomes of the data.
        schedule: makes a scheduler from the optimizer and the number of steps.
        accumulate: micro-batches of the problem's batch size per step.
        early_stopping: evaluations without progress on held-out training data after which training
            stops; the parameters are then those of the best one.
        by: ``"torch"``: clipping, penalties and accumulation are torch's own.
        twin: name of the arm of ours that this one repeats with torch's own functions.
    """

    name: str
    remedy: str = "none"
    about: str = ""
    max_norm: float | None = None
    clip_value: float | None = None
    clip: Policy | None = None
    skip: SkipSpikes | None = None
    l1: float = 0.0
    l2: float = 0.0
    weight_decay: float = 0.0
    model: Mapping[str, Any] = field(default_factory=dict)
    task: Callable[[Task], Task] | None = None
    schedule: Schedule | None = None
    accumulate: int = 1
    early_stopping: int = 0
    by: Literal["steadygrad", "torch"] = "steadygrad"
    twin: str | None = None

    def __post_init__(self) -> None:
        """Refuses what torch alone cannot do.

        Raises:
            ValueError: ``by="torch"`` with a policy of ours, or a name that is no line of text.
        """
        check_name("Arm", self.name)
        if self.by == "torch" and (self.clip is not None or self.skip is not None):
            raise ValueError(f"Arm {self.name!r}: by: expected 'steadygrad' with clip= or skip=")

    def by_torch(self, **changes: Any) -> Arm:
        """The same remedy with torch's own functions, as the twin of this arm."""
        return dataclasses.replace(
            self, name=f"{self.name} (torch)", by="torch", twin=self.name, **changes
        )

    def stepper(
        self, parameters: Sequence[nn.Parameter], learning_rate: float, momentum: float
    ) -> Stepper:
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
        if self.by == "torch":
            return TorchStepper(sgd, parameters, self)
        return OurStepper(sgd, self)

    def describe(self) -> dict[str, Any]:
        """Return name, remedy and all that differs from no remedy, as JSON values."""
        changes = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in ("name", "remedy", "about", "by", "twin")
            and getattr(self, item.name) not in (None, 0, 0.0, {})
        }
        if changes.get("accumulate") == 1:
            del changes["accumulate"]
        return {
            "name": self.name,
            "remedy": self.remedy,
            "about": self.about,
            "by": self.by,
            "twin": self.twin,
            "limit": self.max_norm,
            "settings": {
                name: getattr(value, "__name__", None) or _plain(value)
                for name, value in changes.items()
            },
        }


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else repr(value)


class OurStepper:
    """Steps of a :class:`steadygrad.Stabilizer`."""

    def __init__(self, sgd: torch.optim.SGD, arm: Arm) -> None:
        self.optimizer: torch.optim.Optimizer
        self.optimizer = self._stabilizer = Stabilizer(
            sgd,
            max_norm=arm.max_norm,
            clip=arm.clip,
            clip_value=arm.clip_value,
            skip=arm.skip,
            l1=arm.l1,
            l2=arm.l2,
            nonfinite="propagate",
        )

    def penalty(self) -> Tensor | None:
        """Nothing: penalties are part of the step."""
        return None

    def step(self) -> None:
        """Clip, penalise and update."""
        self._stabilizer.step()

    @property
    def clipped_steps(self) -> int:
        """Steps at which the clip was active."""
        return self._stabilizer.clipped_steps

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out."""
        return self._stabilizer.skipped_steps

    @property
    def grad_norm(self) -> float:
        """Norm before the clip, of the last step."""
        return self._stabilizer.grad_norm.item()


class TorchStepper:
    """The same with ``torch.nn.utils`` and penalties in the loss, as one would write it by hand."""

    skipped_steps = 0
    grad_norm: float | None = None

    def __init__(self, sgd: torch.optim.SGD, parameters: Sequence[nn.Parameter], arm: Arm) -> None:
        self.optimizer: torch.optim.Optimizer = sgd
        self.clipped_steps = 0
        self._parameters = parameters
        self._arm = arm

    def penalty(self) -> Tensor | None:
        """What is added to the loss."""
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


Stepper = OurStepper | TorchStepper
