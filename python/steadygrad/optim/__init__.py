"""Stabilized optimizers: ``torch.optim``'s classes with clipping, penalties and non-finite policies in their step."""

from __future__ import annotations

from steadygrad.optim.adagrad import Adagrad
from steadygrad.optim.adam import Adam, AdamW
from steadygrad.optim.rmsprop import RMSprop
from steadygrad.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]
