"""The kinds of stabilized optimizers, each with torch's own optimizer to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

import steadygrad as sg
from tests.optim import unfused
from tests.optim.parameter_sets import assign_copies, gradient_sequence

Make = Callable[..., Any]


def _wrapped(rule: str) -> Make:
    def make(params: Any, lr: Any = 0.05, **ours: Any) -> Any:
        return sg.Stabilizer(unfused.optimizer_class(rule)(params, lr=lr), **ours)

    return make


def _subclass(rule: str) -> Make:
    def make(params: Any, lr: Any = 0.05, **ours: Any) -> Any:
        return getattr(sg.optim, rule)(params, lr=lr, **ours)

    return make


# The fused path as a wrapper and as a class, for rules with and without state, and the in-place path.
MAKERS: dict[str, Make] = {
    "AdamW": _wrapped("AdamW"),
    "SGD": _wrapped("SGD"),
    "Adagrad": _wrapped("Adagrad"),
    "subclass": _subclass("AdamW"),
    "in-place": _wrapped("NAdam"),
}
_TWINS = {"subclass": "AdamW", "in-place": "NAdam"}
# These kinds have adaptive moments, which schedulers cycle and checkpoints hold.
WITH_STATE = ["AdamW", "subclass", "in-place"]


def make_twin(kind: str, params: Any, lr: Any = 0.05) -> torch.optim.Optimizer:
    """Return torch's own optimizer with the same settings."""
    made: torch.optim.Optimizer = getattr(torch.optim, _TWINS.get(kind, kind))(params, lr=lr)
    return made


def give(params: Sequence[Parameter], seed: int = 0, element: float | None = None) -> None:
    """Set gradients of norm about 10, and the last element of the last one to ``element`` if given."""
    assign_copies(params, gradient_sequence(params, 1, seed=seed, decades=0)[0])
    if element is not None:
        last = params[-1].grad
        assert last is not None
        last.view(-1)[-1] = element
