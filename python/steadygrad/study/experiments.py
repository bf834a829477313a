"""What an experiment is, and the experiments there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .arms import REMEDIES, Arm
from .data import Dataset, digits
from .models import Mlp


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the numbers of a study; each arm meets each learning rate and seed.

    Attributes:
        name: short name, used in files.
        title: what is trained, in words.
        data: loads the data.
        model: the network, with the initialization that the remedies have to cope with.
        arms: the remedies; the first is the baseline that the others are compared with.
        learning_rates: in ascending order.
        seeds: a seed fixes initial weights and batches, the same ones for every arm.
        steps: length of a run, in steps.
        batch_size: examples per step.
        momentum: of SGD.
        time_limit_s: no run is started once this many seconds have gone by.
    """

    name: str
    title: str
    data: Callable[[], Dataset]
    model: Mlp
    arms: tuple[Arm, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    momentum: float
    time_limit_s: float

    def plan(self) -> list[tuple[int, float, Arm]]:
        """List the runs as (seed, learning rate, arm), seed by seed.

        A study that is cut short then has compared all arms on fewer seeds, not fewer arms.
        """
        return [
            (seed, learning_rate, arm)
            for seed in self.seeds
            for learning_rate in self.learning_rates
            for arm in self.arms
        ]


QUICK = Experiment(
    name="quick",
    title="20-layer ReLU MLP, initialised at 1.5 x He, SGD with momentum",
    data=digits,
    model=Mlp(layers=20, width=100, init_gain=1.5),
    arms=REMEDIES,
    learning_rates=(1e-5, 1e-2, 3e-2, 1e-1),
    seeds=(0, 1, 2),
    steps=1500,
    batch_size=32,
    momentum=0.9,
    time_limit_s=200.0,
)
