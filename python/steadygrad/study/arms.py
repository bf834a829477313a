"""The remedies under comparison, one line each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from steadygrad import Stabilizer


@dataclass(frozen=True)
class Arm:
    """One remedy. What is left out stays as it is without a remedy.

    Attributes:
        name: how tables, plots and files call it.
        max_norm: limit of the global gradient norm.
        l1: factor of ``sum |p|`` in the loss.
        l2: factor of ``sum p^2 / 2`` in the loss.
        init_gain: gain of the initial weights, in place of the model's own.
    """

    name: str
    max_norm: float | None = None
    l1: float = 0.0
    l2: float = 0.0
    init_gain: float | None = None

    def optimizer(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float
    ) -> Stabilizer:
        """Make SGD with this remedy in front of it.

        Non-finite gradients are applied as torch applies them (``nonfinite="propagate"``) in every
        arm: an explosion is seen and not skipped over, and what an arm gains is due to its remedy.
        """
        return Stabilizer(
            torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum),
            max_norm=self.max_norm,
            l1=self.l1,
            l2=self.l2,
            nonfinite="propagate",
        )


REMEDIES = (
    Arm("none"),
    Arm("clip", max_norm=1.0),
    Arm("L1", l1=1e-4),
    Arm("L2", l2=1e-2),
    Arm("clip+L2", max_norm=1.0, l2=1e-2),
    Arm("He init", init_gain=1.0),
)
