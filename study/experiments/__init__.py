"""The experiments there are, one file each."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from ..data import Dataset
from ..experiment import Experiment
from ..tasks import Classification, Task
from ..transformer import TRANSFORMER_ADAMW, TRANSFORMER_SGD
from .char import CHAR
from .digits import DIGITS, QUICK
from .mlp_depth import MLP_DEPTH
from .mnist import MNIST
from .rnn import RNN

EXPERIMENTS = (DIGITS, MNIST, MLP_DEPTH, RNN, CHAR, TRANSFORMER_SGD, TRANSFORMER_ADAMW)
ON_IMAGES = ("mnist",)

__all__ = ["EXPERIMENTS", "ON_IMAGES", "QUICK", "on_data"]


def on_data(experiments: Sequence[Experiment], folder: pathlib.Path) -> list[Experiment]:
    """Return the experiments with the data of a folder in the place of the 5,000 digits.

    Where the folder holds MNIST and CIFAR-10, each problem is there once for either.

    Raises:
        DataFileError: the folder holds neither.
        ValueError: an experiment is not about images.
    """
    images = (DIGITS.name, MNIST.name, MLP_DEPTH.name)
    for experiment in experiments:
        if experiment.name not in images:
            raise ValueError(
                f"study: --data: expected experiments on images ({', '.join(images)}), "
                f"got {experiment.name}"
            )
    from ..data_files import datasets_in

    loaders = datasets_in(folder)
    changed = []
    for experiment in experiments:
        problems, full_problems = (
            tuple(
                dataclasses.replace(problem, name=f"{problem.name}, {name}", task=_task(load))
                for name, load in loaders.items()
                for problem in group
            )
            for group in (experiment.problems, experiment.full_problems)
        )
        changed.append(
            dataclasses.replace(experiment, problems=problems, full_problems=full_problems)
        )
    return changed


def _task(load: Callable[[], Dataset]) -> Callable[[], Task]:
    return lambda: Classification(load())
