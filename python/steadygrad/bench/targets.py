"""The floors that steadygrad holds itself to, and whether a run met them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from steadygrad.bench import peers
from steadygrad.bench.measure import CaseResult


@dataclass(frozen=True)
class Target:
    """`case` has to be `at_least` times as fast as `peer`, or reach that share of `COPY`."""

    case: str
    peer: str
    at_least: float


# Names the copy bandwidth in the place of a peer.
COPY = "copy bandwidth"

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

CUDA_TARGETS: tuple[Target, ...] = (
    Target("clip_inactive/one_2e28", peers.TORCH_FOREACH, 2.5),
    Target("clip_inactive/one_2e28", COPY, 0.9),
    Target("clip_active/one_2e28", peers.TORCH_FOREACH, 1.05),
    Target("clip_active/one_2e28", COPY, 0.9),
    Target("adamw/gpt2", peers.CLIP_FUSED, 1.2),
    Target("adamw/one_2e28", peers.CLIP_FUSED, 1.2),
    Target("adamw/gpt2", peers.FUSED_FOLDED, 1.08),
    Target("adamw/resnet50", peers.CLIP_FUSED, 2.0),
    Target("adamw/small", peers.CLIP_FUSED, 5.0),
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


def judge(results: Iterable[CaseResult], device: str = "cpu") -> list[Verdict]:
    """One verdict per target of the device, "cpu" or "cuda", in their order."""
    ratios: dict[tuple[str, str], float] = {}
    for result in results:
        for peer in result.peers:
            ratios[result.case.key, peer.timing.name] = peer.ratio
        if result.share_of_copy is not None:
            ratios[result.case.key, COPY] = result.share_of_copy
    targets = CUDA_TARGETS if device == "cuda" else TARGETS
    return [Verdict(target, ratios.get((target.case, target.peer))) for target in targets]
