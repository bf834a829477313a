"""Seeds of the whole test suite."""

from __future__ import annotations

import random

import hypothesis
import numpy as np
import pytest
import torch

from backends import backend as backend  # the fixtures, for every test file
from backends import kernels as kernels
from digit_training import one_thread as one_thread

SEED = 20240229

# Examples are derived from each test's source, so that every run draws the same ones.
hypothesis.settings.register_profile("steadygrad", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steadygrad")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator before each test, so that its order among them is without effect."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """NumPy generator for the inputs of one test."""
    return np.random.default_rng(seed)
