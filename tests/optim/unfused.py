"""Optimizers that no kernel takes: subclasses of torch's classes, which may override anything."""

from __future__ import annotations

from typing import Any

import torch


class NAdam(torch.optim.NAdam):
    pass


class RAdam(torch.optim.RAdam):
    pass


class Adamax(torch.optim.Adamax):
    pass


class Adadelta(torch.optim.Adadelta):
    pass


class ASGD(torch.optim.ASGD):
    pass


class Rprop(torch.optim.Rprop):
    pass


def optimizer_class(name: str) -> Any:
    """Return the class of this name in this file, or else torch's."""
    return globals().get(name) or getattr(torch.optim, name)
