"""A small post-LN transformer on real text, without warm-up, with SGD and with AdamW."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import remedies as r
from ..arms import Arm, OurStepper, Stepper
from ..experiment import Experiment, Problem
from ..sequences import NextCharacter
from ..transformer import Transformer

PRE_NORM = Arm("pre-LN", "placement of the norm", "Xiong et al.", model={"pre_norm": True})
SMALL_INIT = Arm("init / 2", "initialisation", "half of Glorot's", model={"init_gain": 0.5})

_ARMS = (
    r.NONE,
    r.CLIP,
    r.CLIP_QUARTER,
    r.DAMP,
    r.PERCENTILE,
    r.Z_SCORE,
    r.Z_SCORE_CAPPED,
    r.RELATIVE,
    r.SKIP,
    r.BACKOFF,
    r.L2,
    r.WEIGHT_DECAY,
    r.DROPOUT,
    r.WARMUP,
    r.COSINE,
    r.CLIP_WARMUP,
    PRE_NORM,
    SMALL_INIT,
)


@dataclass(frozen=True)
class AdamWArm(Arm):
    """A remedy in front of AdamW in the place of SGD."""

    def stepper(
        self, parameters: Sequence[nn.Parameter], learning_rate: float, momentum: float
    ) -> Stepper:
        """Make AdamW with this remedy in front of it; ``momentum`` is its beta1."""
        adamw: Any = torch.optim.AdamW(
            parameters, learning_rate, (momentum, 0.999), weight_decay=self.weight_decay
        )
        return OurStepper(adamw, self)


def _with_adamw(arm: Arm) -> AdamWArm:
    fields = {field.name: getattr(arm, field.name) for field in dataclasses.fields(arm)}
    return AdamWArm(**fields)


def _experiment(
    optimizer: str, arms: tuple[Arm, ...], rates: tuple[float, ...], momentum: float
) -> Experiment:
    return Experiment(
        name=f"transformer-{optimizer.lower()}",
        title=f"A post-LN transformer on the help texts of CPython, with {optimizer}",
        about="Four blocks with the layer norms behind the sums, as in Vaswani et al. 2017, and no "
        "warm-up: at rates from one at which it trains to one at which it is lost.",
        problems=(
            Problem(
                name=f"post-LN, {optimizer}",
                title=f"4 post-LN blocks of 32 units on pieces of 64 characters, {optimizer}",
                task=NextCharacter,
                model=Transformer(),
                steps=300,
                batch_size=16,
                momentum=momentum,
            ),
        ),
        arms=arms,
        learning_rates=rates,
    )


TRANSFORMER_SGD = _experiment("SGD", _ARMS, (0.003, 0.03, 0.3, 1.0), 0.9)
TRANSFORMER_ADAMW = _experiment(
    "AdamW", tuple(map(_with_adamw, _ARMS)), (3e-4, 1e-3, 1e-2, 1e-1), 0.9
)
