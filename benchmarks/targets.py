"""The floors that steadygrad holds itself to, and whether a run met them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks import batch_norm_candidates as norms
from benchmarks import peers
from benchmarks.cases import CASES, CUDA_CASES
from benchmarks.measure import CaseResult
from benchmarks.summary import FASTEST, Summary, summaries

# What of a group of cases is compared.
MEAN = "geometric mean"
SLOWEST = "slowest case"


@dataclass(frozen=True)
class Target:
    """`case` has to be `at_least` times as fast as `peer`, or reach that share of `COPY`.

    With `over`, `case` names a group, of which the `MEAN` or the `SLOWEST` case counts.
    """

    case: str
    peer: str
    at_least: float
    over: str = ""

    @property
    def name(self) -> str:
        """The case, or the group and what of it counts."""
        return f"{self.case}, {self.over}" if self.over else self.case


# Names the copy bandwidth in the place of a peer.
COPY = "copy bandwidth"


def _fusion(group: str, mean: float, *names: str) -> tuple[Target, ...]:
    """The mean against each peer, and no case slower than any of them."""
    means = (Target(group, name, mean, MEAN) for name in names)
    return (*means, Target(group, FASTEST if len(names) > 1 else names[0], 1.0, SLOWEST))


_IN_PLACE_TOO = (norms.TORCH, norms.TORCH_IN_PLACE)
_PLAIN_CUDA = (norms.CUDNN, norms.NATIVE)
_ALL_CUDA = (*_PLAIN_CUDA, norms.CUDNN_IN_PLACE, norms.NATIVE_IN_PLACE)

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
    *_fusion("batch_norm", 1.5, norms.TORCH),
    *_fusion("batch_norm_relu", 1.8, *_IN_PLACE_TOO),
    *_fusion("batch_norm_add_relu", 2.0, *_IN_PLACE_TOO),
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
    *_fusion("batch_norm", 1.3, *_PLAIN_CUDA),
    *_fusion("batch_norm_relu", 2.0, *_ALL_CUDA),
    *_fusion("batch_norm_add_relu", 2.0, *_ALL_CUDA),
)


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured for it.

    Attributes:
        target: the target.
        ratio: None when the run did not include the case, or no case of the group.
        cases: how many cases were measured.
        of: how many there are.
    """

    target: Target
    ratio: float | None
    cases: int = 1
    of: int = 1

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None when it was not measured, or not over all its cases."""
        if self.ratio is None or self.cases < self.of:
            return None
        return self.ratio >= self.target.at_least


def judge(results: Iterable[CaseResult], device: str = "cpu") -> list[Verdict]:
    """One verdict per target of the device, "cpu" or "cuda", in their order."""
    results = list(results)
    ratios: dict[tuple[str, str], float] = {}
    for result in results:
        for peer in result.peers:
            ratios[result.case.key, peer.timing.name] = peer.ratio
        if result.share_of_copy is not None:
            ratios[result.case.key, COPY] = result.share_of_copy
    groups = {(summary.group, summary.peer): summary for summary in summaries(results)}
    sizes = Counter(case.group for case in (CUDA_CASES if device == "cuda" else CASES))

    def verdict(target: Target) -> Verdict:
        name = (target.case, target.peer)
        if target.over:
            return _of_group(target, groups.get(name), sizes[target.case])
        ratio = ratios.get(name)
        return Verdict(target, ratio, int(ratio is not None))

    return [verdict(target) for target in (CUDA_TARGETS if device == "cuda" else TARGETS)]


def _of_group(target: Target, summary: Summary | None, size: int) -> Verdict:
    if summary is None:
        return Verdict(target, None, 0, size)
    ratio = summary.mean if target.over == MEAN else summary.least
    return Verdict(target, ratio, summary.cases, size)
