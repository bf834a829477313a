"""A small real problem for the integrations: the 1,797 digits of scikit-learn, 8 x 8 pixels, without a download."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import steadygrad as sg
from tests.optim import unfused

BATCH = 64


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread, since networks this small are not faster on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return pixels in [0, 1], float32 ``(1797, 64)``, and labels, int64."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def dataset(batches: int) -> torch.utils.data.TensorDataset:
    """Return the first ``batches`` batches as a data set."""
    return torch.utils.data.TensorDataset(*(part[: batches * BATCH] for part in digits()))


def batches(count: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``count`` batches of random digits, after skipping ``skip`` others."""
    inputs, labels = digits()
    generator = torch.Generator().manual_seed(0)
    for index in range(skip + count):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        if index >= skip:
            yield inputs[chosen], labels[chosen]


def network(*, norm: bool = False) -> nn.Sequential:
    """Return a network with the same weights on every call."""
    torch.manual_seed(7)
    middle: list[nn.Module] = [sg.nn.BatchNorm1d(32, activation="relu")] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(64, 32), *middle, nn.Linear(32, 10))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return functional.cross_entropy(model(batch[0]).float(), batch[1])


# A checkpoint has to keep counters, what policies learn, and the bits that half precision would lose.
HALF: dict[str, Any] = {"max_norm": 1.0, "state_dtype": torch.float32}
LEARNING: dict[str, Any] = {"clip": sg.ClipZScore(), "skip": sg.SkipSpikes()}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "max_norm": lambda p: sg.Stabilizer(torch.optim.AdamW(p, lr=0.01), max_norm=0.5),
    "policies": lambda p: sg.Stabilizer(torch.optim.SGD(p, lr=0.3, momentum=0.9), **LEARNING),
    "subclass": lambda p: sg.optim.AdamW(p, lr=0.01, **LEARNING),
    "in-place": lambda p: sg.Stabilizer(unfused.NAdam(p, lr=0.01), clip=sg.ClipPercentile()),
}
ROUNDED: dict[str, Callable[[Any], Any]] = {
    rounding: lambda p, rounding=rounding: sg.Stabilizer(
        torch.optim.AdamW(p, lr=0.01), rounding=rounding, **HALF
    )
    for rounding in ("kahan", "master", "stochastic")
}
