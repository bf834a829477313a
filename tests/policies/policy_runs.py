"""Recorded norms with spikes, and optimizers whose gradients have those norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.reference import policies as reference

Make = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A policy and its definition."""

    policy: Make
    reference: Make


# Windows and warm-ups are short enough to be passed; with the defaults they would not be in 500 steps.
CLIPS: dict[str, Case] = {
    "percentile": Case(sg.ClipPercentile, reference.ClipPercentile),
    "percentile-window": Case(
        lambda: sg.ClipPercentile(37.5, window=50), lambda: reference.ClipPercentile(37.5, 50)
    ),
    "percentile-of-one": Case(
        lambda: sg.ClipPercentile(100, window=1), lambda: reference.ClipPercentile(100, 1)
    ),
    "zscore": Case(sg.ClipZScore, reference.ClipZScore),
    "zscore-capped": Case(
        lambda: sg.ClipZScore(max_norm=1.0), lambda: reference.ClipZScore(max_norm=1.0)
    ),
    "zscore-uncapped": Case(
        lambda: sg.ClipZScore(2.0, 0.9, warmup=5, max_norm=None, clip_factor=0.8),
        lambda: reference.ClipZScore(2.0, 0.9, 5, None, 0.8),
    ),
    "relative": Case(sg.ClipRelative, reference.ClipRelative),
    "relative-short": Case(
        lambda: sg.ClipRelative(1.2, 0.9, warmup=1, max_norm=None),
        lambda: reference.ClipRelative(1.2, 0.9, 1, None),
    ),
    "damp": Case(lambda: sg.Damp(1.0), lambda: reference.Damp(1.0)),
    "damp-hard": Case(lambda: sg.Damp(0.5, power=1.0), lambda: reference.Damp(0.5, 1.0)),
}
LEARNING = [name for name in CLIPS if not name.startswith("damp")]
SKIPS: dict[str, Case] = {
    "spikes": Case(sg.SkipSpikes, reference.SkipSpikes),
    "spikes-window": Case(
        lambda: sg.SkipSpikes(3.0, window=7), lambda: reference.SkipSpikes(3.0, 7)
    ),
}


def recorded_norms(steps: int = 500, seed: int = 0) -> list[float]:
    """Return norms like those of a training: a falling level, noise, spikes, and steps that teach nothing."""
    rng = np.random.default_rng(seed)
    norms = 3 * np.exp(-np.arange(steps) / 250) * np.exp(rng.normal(0, 0.3, steps))
    spikes = rng.choice(np.arange(30, steps), size=steps // 40, replace=False)
    norms[spikes] *= rng.choice([5.0, 30.0, 1e4], size=len(spikes))
    for step, value in ((7, 0.0), (20, math.nan), (steps // 2, 0.0), (steps // 2 + 9, math.inf)):
        norms[step] = value
    return [float(norm) for norm in norms]


class Driven:
    """An optimizer of parameters of one element, whose gradients are given norms.

    Args:
        count: Number of parameters, each in a param group of its own.
        device: Device of the parameters.
        make: A function of param groups and options; by default SGD with a rate of 1, so that an update is the clipped
            norm.
        ours: Options of the stabilized optimizer.
    """

    def __init__(
        self, count: int, device: torch.device, make: Callable[..., Any] | None = None, **ours: Any
    ) -> None:
        like = torch.zeros(1, dtype=torch.float64, device=device)
        self.params = [Parameter(like.clone()) for _ in range(count)]
        make = make or sg.optim.SGD
        self.optimizer = make([{"params": [p]} for p in self.params], lr=1.0, **ours)

    def step(self, *norms: float | None) -> list[float]:
        """Take one step; return the part of the gradients that the update used."""
        for param, norm in zip(self.params, norms, strict=True):
            param.data.zero_()
            param.grad = None if norm is None else torch.full_like(param, norm)
        self.optimizer.step()
        return [-param.item() for param in self.params]

    def learnt(self) -> list[Any]:
        """Return what the policies have learnt, as a state dict holds it."""
        group = self.optimizer.state_dict()["param_groups"][0]
        return [group.get("clip_state"), group.get("skip_state")]


def assert_follows(taken: float, norm: float, coefficient: float) -> None:
    """Check that the update is the gradient times the coefficient."""
    assert math.isclose(taken, norm * coefficient, rel_tol=1e-12), (taken, norm, coefficient)


def finite(norms: Sequence[float]) -> list[float]:
    """Return the norms of steps that are not skipped."""
    return [norm for norm in norms if math.isfinite(norm)]
