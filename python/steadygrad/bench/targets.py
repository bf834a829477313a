"""The floors that steadygrad holds itself to, and whether a run met them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from steadygrad.bench import peers
from steadygrad.bench.measure import CaseResult


@dataclass(frozen=True)
class Target:
    """`case` has to be `at_least` times as fast as `peer`."""

    case: str
    peer: str
    at_least: float


TARGETS: tuple[Target, ...] = (
    Target("clip_active/resnet50", peers.TORCH_FOREACH, 1.5),
    Target("clip_inactive/resnet50", peers.TORCH_FOREACH, 2.8),
    Target("clip_active/small", peers.TORCH_FOREACH, 10.0),
    Target("clip_inactive/small", peers.TORCH_FOREACH, 10.0),
    Target("adamw/resnet50", peers.CLIP_FUSED, 1.4),
    Target("adamw/gpt2", peers.CLIP_FUSED, 1.2),
    Target("adamw/small", peers.CLIP_FUSED, 20.0),
    Target("adamw/resnet50", peers.CLIP_DEFAULT, 3.0),
    Target("adamw/gpt2", peers.CLIP_DEFAULT, 3.0),
)


@dataclass(frozen=True)
class Verdict:
    """A target and the ratio measured for it; None when the run did not include the case."""

    target: Target
    ratio: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None when it was not measured."""
        return None if self.ratio is None else self.ratio >= self.target.at_least


def judge(results: Iterable[CaseResult]) -> list[Verdict]:
    """One verdict per target, in the order of `TARGETS`."""
    ratios = {
        (result.case.key, peer.timing.name): peer.ratio
        for result in results
        for peer in result.peers
    }
    return [Verdict(target, ratios.get((target.case, target.peer))) for target in TARGETS]
