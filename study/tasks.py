"""Define tasks: batches to train on, a loss, and a metric on held-out data."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .data import Dataset

Batch = tuple[Tensor, Tensor]

# A network has learned if its accuracy is three times that of guessing: .30 with 10 classes and
# 1,000 test images, where guessing gets .10 with a standard deviation of .0095. With fewer than 5
# classes the bound is halfway between guessing and 1.
LEARNED_TIMES_CHANCE = 3.0


@dataclass(frozen=True)
class Metric:
    """Describes what a task measures on held-out data."""

    name: str  # in words, "test accuracy" for instance
    better: Literal["higher", "lower"]  # which numbers are better
    guessing: float  # value that guessing gets
    learned: float  # bound at which a run that survived has learned
    target: float  # value that steps_to_target waits for

    def reached(self, value: float | None, bound: float) -> bool:
        """Return whether ``value`` is at least as good as ``bound``."""
        if value is None or not math.isfinite(value):
            return False
        slack = 1e-9 * max(abs(bound), 1.0)  # .3 reaches the bound 3 * .1, which is a little more
        return value >= bound - slack if self.better == "higher" else value <= bound + slack


class Task(ABC):
    """Provides the data and the loss of a problem."""

    name: str  # description of the data, in words
    inputs: int  # number of features, channels of a sequence or characters of an alphabet
    outputs: int  # number of outputs of the network
    metric: Metric  # metric on held-out data

    @abstractmethod
    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield training batches without end, in an order that ``generator`` decides."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, a mean over its examples."""

    @abstractmethod
    def training_loss(self, model: nn.Module) -> float:
        """Return the loss on a fixed part of the training data, the same on every call.

        It is called without gradients, as :meth:`measure` is.
        """

    @abstractmethod
    def measure(self, model: nn.Module) -> float | None:
        """Return the metric on held-out data, None if an output is not finite."""

    def hold_out(self, seed: int) -> tuple[Task, Task]:
        """Split the training data for early stopping; return the task to train on and the held-out one.

        Raises:
            ValueError: The task has no training data to split.
        """
        raise ValueError(f"{type(self).__name__}: early stopping: it has no validation data")


class Classification(Task):
    """Asks for the class of an example.

    Args:
        data: Training and test examples.
        target: Test accuracy that ``steps_to_target`` waits for. Default: 0.8.
        largest_shift: Largest number of pixels that a training image is moved by. Default: 0.
    """

    def __init__(self, data: Dataset, target: float = 0.8, largest_shift: int = 0) -> None:
        self.data = data
        self.largest_shift = largest_shift
        self.name = data.name
        self.inputs = data.train_inputs.shape[1]
        self.outputs = data.classes
        learned = min(LEARNED_TIMES_CHANCE * data.chance, (1 + data.chance) / 2)
        self.metric = Metric("test accuracy", "higher", data.chance, learned, target)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        # The data is shuffled anew after each pass; an incomplete last batch is left out of a pass.
        inputs, labels = self.data.train_inputs, self.data.train_labels
        while True:
            order = torch.randperm(len(labels), generator=generator)
            for batch in order.split(batch_size):
                if len(batch) == batch_size or len(order) < batch_size:
                    chosen = inputs[batch]
                    if self.largest_shift:
                        chosen = _shifted(chosen, self.largest_shift, generator)
                    yield chosen, labels[batch]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    def training_loss(self, model: nn.Module) -> float:
        # About 1,000 examples, spread evenly over the training part, are enough.
        every = max(1, len(self.data.train_labels) // 1000)
        inputs, labels = self.data.train_inputs[::every], self.data.train_labels[::every]
        return cross_entropy(model(inputs), labels).item()

    def measure(self, model: nn.Module) -> float | None:
        outputs = model(self.data.test_inputs)
        if not bool(outputs.isfinite().all()):
            return None  # the argmax of NaN is class 0, which is not a prediction
        labels = self.data.test_labels
        return int((outputs.argmax(1) == labels).sum()) / len(labels)

    def hold_out(self, seed: int) -> tuple[Task, Task]:
        """Split off a tenth of the training part for early stopping."""
        inputs, labels = self.data.train_inputs, self.data.train_labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        held, kept = (
            self.having(train_inputs=inputs[part], train_labels=labels[part])
            for part in (order[: len(labels) // 10], order[len(labels) // 10 :])
        )
        return kept, held

    def having(self, **tensors: Any) -> Classification:
        """Return the same task with some tensors of its data replaced."""
        task = copy.copy(self)
        task.data = replace(self.data, **tensors)
        return task


def image_shape(features: int) -> tuple[int, int, int]:
    """Return channels, height and width of a square image with one or three channels.

    Raises:
        ValueError: No square image has this number of features.
    """
    for channels in (1, 3):
        side = math.isqrt(features // channels)
        if channels * side * side == features:
            return channels, side, side
    raise ValueError(
        f"image_shape: features: expected those of a square image of 1 or 3 channels, got {features}"
    )


def raw_pixels(task: Task) -> Task:
    """Return the task with pixels from 0 to 255, without normalization."""
    images = _classification("raw_pixels", task)
    parts = {"train_inputs": images.data.train_inputs, "test_inputs": images.data.test_inputs}
    low = min(part.min().item() for part in parts.values())
    high = max(part.max().item() for part in parts.values())
    scale = 255.0 / (high - low)
    return images.having(**{name: (part - low) * scale for name, part in parts.items()})


def shifted_images(task: Task) -> Task:
    """Return the task with training images moved by up to two pixels, as data augmentation."""
    changed = copy.copy(_classification("shifted_images", task))
    changed.largest_shift = 2
    return changed


def _classification(what: str, task: Task) -> Classification:
    if not isinstance(task, Classification):
        raise ValueError(f"{what}: task: expected a Classification, got {type(task).__name__}")
    return task


def _shifted(inputs: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Move each image by a random number of pixels; the smallest value fills what moves in."""
    channels, height, width = image_shape(inputs.shape[1])
    images = inputs.view(-1, channels, height, width)
    # The smallest value is the background of a digit.
    padded = nn.functional.pad(images, [largest] * 4, value=inputs.min().item())
    offsets = torch.randint(0, 2 * largest + 1, (len(images), 2), generator=generator)
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    index = torch.arange(len(images))[:, None, None]
    moved = padded.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1).reshape(len(images), -1)
