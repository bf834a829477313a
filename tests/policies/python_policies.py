"""Clip policies as users write them, on torch tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import steadygrad as sg
from steadygrad.reference import policies as reference
from tests.policies.policy_runs import Case


class ZScore(sg.ClipPolicy):
    """Reimplements ``sg.ClipZScore`` for any number of scopes."""

    def __init__(self, max_norm: float = math.inf, warmup: int = 25) -> None:
        self.max_norm, self.warmup = max_norm, warmup
        self.mean: Tensor | None = None

    def limits(self, norms: Tensor) -> Tensor:
        if self.mean is None:
            self.mean, self.variance, self.count = (torch.zeros_like(norms) for _ in range(3))
        mean, variance, count = self.mean, self.variance, self.count
        warms = count < self.warmup
        deviation = variance.sqrt()
        z = (norms - mean) / (deviation + 1e-6)
        own = torch.where(z > 2.5, mean + 2.5 * deviation / (z / 2.5), math.inf)
        seen = torch.where(warms | (z <= 2.5), norms, own)
        share = torch.where(warms, 1 / (count + 1), 0.03)
        moved = mean + share * (seen - mean)
        # Welford's formula is for the first norms, the published one for the moving average.
        spread = torch.where(warms, (seen - mean) * (seen - moved), (seen - moved).square())
        changed = (1 - share) * variance + share * spread
        teaches = (norms > 0) & norms.isfinite()
        for held, new in ((mean, moved), (variance, changed), (count, count + 1)):
            held.copy_(torch.where(teaches, new, held))
        return torch.where(warms, math.inf, own).clamp(max=self.max_norm)


class Median(sg.ClipPolicy):
    """Limits to twice the median of the last norms, without this one; a number as long as there are none."""

    def __init__(self, window: int = 9) -> None:
        self.norms = torch.full((window,), math.nan, dtype=torch.float64)
        self.calls = 0

    def limits(self, norms: Tensor) -> Tensor | float:
        self.calls += 1
        self.norms = self.norms.to(norms.device)
        limit = 2 * self.norms.nanquantile(0.5)
        moved = torch.cat([self.norms[1:], norms])
        self.norms.copy_(torch.where(norms.isfinite() & (norms > 0), moved, self.norms))
        return math.inf if self.calls == 1 else limit


class Given(sg.ClipPolicy):
    """Gives the limits that it is told to, and remembers the norms that it was asked about."""

    def __init__(self, given: Any = math.inf) -> None:
        self.given = given
        self.asked: list[list[float]] = []

    def limits(self, norms: Tensor) -> Any:
        self.asked.append(norms.tolist())
        assert not torch.is_grad_enabled()
        if isinstance(self.given, BaseException):
            raise self.given
        return self.given(norms) if callable(self.given) else self.given

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.asked)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


PYTHON = {"python-zscore": Case(ZScore, reference.ClipZScore)}
