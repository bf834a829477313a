"""Declare what a remedy is, put it into a training run, and list the remedies of the study."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

import steadygrad as sg

from .tasks import Task, raw_pixels, shifted_images

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
    clip: sg.ClipPolicy | None = None  # policy that finds the limit of the norm
    skip: sg.SkipSpikes | None = None  # policy that leaves out steps whose norm is a spike
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
    ) -> sg.Stabilizer | TorchStepper:
        """Make SGD with this remedy in front of it."""
        groups: Any = parameters
        if isinstance(self.clip, sg.ClipAdaptive):
            # As in the paper, weight and bias of the last layer are not clipped.
            groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "clipping": None}]
        sgd = torch.optim.SGD(
            groups, lr=learning_rate, momentum=momentum, weight_decay=self.weight_decay
        )
        return TorchStepper(sgd, parameters, self) if self.by == "torch" else self.stabilized(sgd)

    def stabilized(self, optimizer: torch.optim.Optimizer) -> sg.Stabilizer:
        """Put this remedy in front of an optimizer.

        Every arm applies non-finite gradients as torch does (``nonfinite="propagate"``), so that an
        explosion is recorded and not skipped, and what an arm gains is due to its remedy alone.
        """
        remedies: Any = {name: getattr(self, name) for name in _OF_THE_STEP}
        return sg.Stabilizer(optimizer, **remedies, nonfinite="propagate")

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


def warmup(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Raise the learning rate from a hundredth to its full value over a tenth of the steps."""
    return lr_scheduler.LinearLR(optimizer, 0.01, total_iters=max(1, steps // 10))


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Lower the learning rate along a cosine to 0 over all steps."""
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def step_decay(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Divide the learning rate by 10 after half of the steps, and again after three quarters."""
    return lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])


def plateau(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Halve the learning rate whenever the training loss has not fallen between two evaluations."""
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def backoff(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Halve the learning rate after a skipped step, and let it recover."""
    return sg.LRBackoff(optimizer)


NONE = Arm("none", "none", "SGD as it is")
CLIP = Arm("clip 1", "clipping", "norm limited to 1", max_norm=1.0)
CLIP_5 = Arm("clip 5", "clipping", "norm limited to 5", max_norm=5.0)
CLIP_QUARTER = Arm("clip .25", "clipping", "norm limited to .25", max_norm=0.25)
CLIP_TENTH = Arm("clip .1", "clipping", "norm limited to .1", max_norm=0.1)
CLIP_VALUE = Arm("clip value", "clipping", "elements limited to .1", clip_value=0.1)
DAMP = Arm("Damp", "clipping", "a norm N > 1 becomes its root", clip=sg.Damp(1.0))
PERCENTILE = Arm(
    "ClipPercentile", "adaptive clipping", "AutoClip at its defaults", clip=sg.ClipPercentile()
)
Z_SCORE = Arm("ClipZScore", "adaptive clipping", "ZClip without its cap", clip=sg.ClipZScore())
Z_SCORE_CAPPED = Arm(
    "ClipZScore capped",
    "adaptive clipping",
    "ZClip at its defaults: never above 1",
    clip=sg.ClipZScore(max_norm=1.0),
)
RELATIVE = Arm("ClipRelative", "adaptive clipping", "AdaGC at its defaults", clip=sg.ClipRelative())
RELATIVE_UNCAPPED = Arm(
    "ClipRelative uncapped",
    "adaptive clipping",
    "AdaGC whose warm-up limits nothing",
    clip=sg.ClipRelative(max_norm=None),
)
ADAPTIVE = Arm("ClipAdaptive", "adaptive clipping", "AGC at its defaults", clip=sg.ClipAdaptive())
CLIP_SKIP = Arm(
    "clip 1 + SkipSpikes",
    "combination",
    "norm limited to 1, spikes left out",
    max_norm=1.0,
    skip=sg.SkipSpikes(),
)
SKIP = Arm("SkipSpikes", "skipping", "spikes left out", skip=sg.SkipSpikes())
L1 = Arm("L1", "penalty", "1e-4 sum |p|", l1=1e-4)
L2 = Arm("L2", "penalty", "1e-2 sum p^2 / 2", l2=1e-2)
WEIGHT_DECAY = Arm("weight decay", "weight decay", "of SGD, 1e-2", weight_decay=1e-2)
ACTIVATION_L1 = Arm(
    "activation L1", "activation penalty", "1e-4 sum |a|", model={"activation_l1": 1e-4}
)
ACTIVATION_L2 = Arm(
    "activation L2", "activation penalty", "1e-3 sum a^2 / 2", model={"activation_l2": 1e-3}
)
BATCH_NORM = Arm("batch norm", "batch norm", "before each ReLU", model={"norm": "steadygrad"})
DROPOUT = Arm("dropout", "dropout", "a tenth of the units", model={"dropout": 0.1})
HE = Arm("He init", "initialisation", "weights of the right size", model={"init_gain": 1.0})
XAVIER = Arm(
    "Xavier init", "initialisation", "Glorot and Bengio", model={"init": "xavier", "init_gain": 1.0}
)
ORTHOGONAL = Arm(
    "orthogonal init",
    "initialisation",
    "Saxe et al.",
    model={"init": "orthogonal", "init_gain": 1.0},
)
TORCH_INIT = Arm("torch's init", "initialisation", "what torch draws", model={"init": "torch"})
LEAKY = Arm("leaky ReLU", "activation", "slope .01 below 0", model={"activation": "leaky relu"})
ELU = Arm("ELU", "activation", model={"activation": "elu"})
TANH = Arm("tanh", "activation", "bounded", model={"activation": "tanh"})
WARMUP = Arm("warmup", "schedule", "a tenth of the steps", schedule=warmup)
COSINE = Arm("cosine", "schedule", "down to 0", schedule=cosine)
STEP_DECAY = Arm("step decay", "schedule", "to 1/10 and 1/100", schedule=step_decay)
PLATEAU = Arm(
    "ReduceLROnPlateau", "dynamic adjustment", "half where the loss does not fall", schedule=plateau
)
BACKOFF = Arm(
    "SkipSpikes + LRBackoff",
    "dynamic adjustment",
    "spikes left out, then half the rate for a while",
    skip=sg.SkipSpikes(),
    schedule=backoff,
)
ACCUMULATE = Arm("accumulate 4", "accumulation", "4 micro-batches a step", accumulate=4)
RAW = Arm("raw pixels", "raw data", "0 to 255, not normalised", task=raw_pixels)
AUGMENT = Arm("shifted images", "data", "by up to 2 pixels", task=shifted_images)
EARLY = Arm("early stopping", "early stopping", "2 looks without progress", early_stopping=2)
CLIP_L2 = Arm("clip 1 + L2", "combination", "both", max_norm=1.0, l2=1e-2)
CLIP_WARMUP = Arm("clip 1 + warmup", "combination", "both", max_norm=1.0, schedule=warmup)
CLIP_NORM = Arm(
    "clip 1 + batch norm", "combination", "both", max_norm=1.0, model={"norm": "steadygrad"}
)
CLIP_HE = Arm("clip 1 + He init", "combination", "both", max_norm=1.0, model={"init_gain": 1.0})

# The twins use torch's own functions, to compare results and times.
NONE_TORCH = NONE.by_torch()
CLIP_TORCH = CLIP.by_torch(about="clip_grad_norm_")
CLIP_VALUE_TORCH = CLIP_VALUE.by_torch(about="clip_grad_value_")
L1_TORCH = L1.by_torch(about="in the loss")
L2_TORCH = L2.by_torch(about="in the loss")
CLIP_L2_TORCH = CLIP_L2.by_torch(about="clip_grad_norm_, L2 in the loss")
BATCH_NORM_TORCH = BATCH_NORM.by_torch(about="torch.nn.BatchNorm", model={"norm": "torch"})
ACTIVATION_L1_TORCH = ACTIVATION_L1.by_torch(
    about="in the loss", model={"activation_l1": 1e-4, "activation_by": "torch"}
)
ACTIVATION_L2_TORCH = ACTIVATION_L2.by_torch(
    about="in the loss", model={"activation_l2": 1e-3, "activation_by": "torch"}
)
ACCUMULATE_TORCH = ACCUMULATE.by_torch(about="backward of loss / 4, four times")

_BY_NAME = {arm.name: arm for arm in list(globals().values()) if isinstance(arm, Arm)}


def named(names: str) -> tuple[Arm, ...]:
    """Return the arms whose names are given, separated by commas."""
    return tuple(_BY_NAME[name.strip()] for name in names.split(","))
