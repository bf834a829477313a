"""Stabilized optimizers: ``torch.optim``'s classes with clipping, penalties and non-finite policies in their step."""

from __future__ import annotations

from steadygrad.optim.classes import SGD, Adagrad, Adam, AdamW, RMSprop

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]
