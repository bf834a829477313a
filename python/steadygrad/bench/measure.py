"""Runs cases: races the candidates beside a copy of memory and derives the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steadygrad.bench.cases import Case
from steadygrad.bench.timer import Candidate, Race, Timing, quartiles, ratio, round_ratios

# Bytes of the yardstick's buffers where the caches are small.
_SMALLEST_BUFFER = 256 * 2**20


@dataclass(frozen=True)
class Effort:
    """How long a case is measured: seconds per race, and bounds on its rounds."""

    seconds: float
    min_rounds: int
    max_rounds: int


QUICK = Effort(seconds=1.5, min_rounds=5, max_rounds=200)
FULL = Effort(seconds=6.0, min_rounds=9, max_rounds=1000)


@dataclass(frozen=True)
class CopyBandwidth:
    """The memory bandwidth that torch reaches with the same threads, in GB/s.

    Attributes:
        copy: `target.copy_(source)`, counted as 8 bytes an fp32 element: one read, one write.
        scale: `target.mul_(x)` in place, counted alike.
    """

    copy: float
    scale: float

    @property
    def yardstick(self) -> float:
        """The larger of the two; what "share of copy" is a share of.

        A copy reads the destination's cache lines before it overwrites them unless it uses
        streaming stores, so it may move 12 bytes where 8 are counted. An in-place scaling really
        moves 8. Taking the larger is the stricter yardstick on every machine.
        """
        return max(self.copy, self.scale)


class CopyYardstick:
    """Two plain copies of memory that take part in every race of a memory-bound case.

    They measure the bandwidth in the same rounds as the candidates, so that a machine that slows
    down for a minute slows the yardstick too. And they flush the caches once a round: each
    candidate finds its buffers cold when its turn comes again.
    """

    def __init__(self, cache_bytes: int) -> None:
        """Reserve the buffers.

        Args:
            cache_bytes: size of the last-level cache; each of the two buffers is at least four
                times as large, and at least 256 MiB.
        """
        elements = max(_SMALLEST_BUFFER // 4, cache_bytes)
        source, target = torch.ones(elements), torch.ones(elements)
        self.buffer_bytes = 4 * elements
        self.candidates = (
            Candidate("copy_", lambda: target.copy_(source)),
            Candidate("mul_", lambda: target.mul_(1.0)),
        )

    def bandwidth(self, timings: Sequence[Timing]) -> CopyBandwidth:
        """The bandwidth from the laps of `candidates`, in their order."""
        copy, scale = timings
        moved = 2 * self.buffer_bytes / 1e9
        return CopyBandwidth(moved / copy.median, moved / scale.median)

    def measure(self, effort: Effort) -> CopyBandwidth:
        """Race the two alone."""
        race = Race(self.candidates)
        race.warm_up(1)
        return self.bandwidth(race.run(effort.seconds, effort.min_rounds, effort.max_rounds))


@dataclass(frozen=True)
class PeerResult:
    """One peer's laps, and ours against it.

    Attributes:
        timing: the peer's laps.
        ratio: median(peer) / median(ours).
        round_ratio: median over the rounds of peer / ours.
        round_ratio_quartiles: lower and upper quartile of the same.
    """

    timing: Timing
    ratio: float
    round_ratio: float
    round_ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class CaseResult:
    """What was measured for one case.

    Attributes:
        case: the case.
        ours: our laps.
        peers: one result per peer.
        bandwidth: the copy bandwidth in the same race; None for a case of host cost.
    """

    case: Case
    ours: Timing
    peers: tuple[PeerResult, ...]
    bandwidth: CopyBandwidth | None

    @property
    def floor_bytes(self) -> int:
        """Bytes our path has to move: the operation's bytes per element times the elements."""
        return self.case.operation.bytes_per_element * self.case.model.elements

    @property
    def gigabytes_per_second(self) -> float:
        """`floor_bytes` over our median time.

        Passes that find data in cache can lift it above the copy bandwidth.
        """
        return self.floor_bytes / self.ours.median / 1e9

    @property
    def share_of_copy(self) -> float | None:
        """`gigabytes_per_second` over the copy bandwidth; None for a case of host cost."""
        if self.bandwidth is None:
            return None
        return self.gigabytes_per_second / self.bandwidth.yardstick

    @property
    def nanoseconds_per_tensor(self) -> float:
        """Our median time over the number of tensors: the cost of a tensor when data is small."""
        return self.ours.median / self.case.model.tensors * 1e9


def working_set_bytes(case: Case) -> int:
    """Bytes of parameters, gradients and states that one call of ours touches."""
    return 4 * case.operation.buffers * case.model.elements


def memory_needed(case: Case) -> int:
    """Bytes to have free: every candidate's buffers, and two values an element for temporaries.

    Parameters and gradients that no candidate reads are reserved but never touched, hence free.
    """
    return len(case.operation.builds) * working_set_bytes(case) + 8 * case.model.elements


def race(case: Case, yardstick: CopyYardstick) -> Race:
    """Candidates over buffers of their own, ours first; then the yardstick if memory bounds."""
    operation = case.operation
    candidates = [build(operation.workload(case.model)) for build in operation.builds]
    if not case.host_cost:
        candidates.extend(yardstick.candidates)
    return Race(candidates)


def summarise(case: Case, timings: Sequence[Timing], yardstick: CopyYardstick) -> CaseResult:
    """The numbers of a case from the laps of its race."""
    count = len(case.operation.builds)
    ours, *others = timings[:count]
    peers = []
    for peer in others:
        per_round = round_ratios(peer, ours)
        peers.append(
            PeerResult(peer, ratio(peer, ours), statistics.median(per_round), quartiles(per_round))
        )
    bandwidth = None if case.host_cost else yardstick.bandwidth(timings[count:])
    return CaseResult(case, ours, tuple(peers), bandwidth)


def measure_case(
    case: Case, effort: Effort, yardstick: CopyYardstick, on_round: Callable[[], object]
) -> CaseResult:
    """Measure one case.

    Args:
        case: what to measure.
        effort: for how long.
        yardstick: takes part in the race where memory is the bound.
        on_round: called between rounds, outside the timed region.
    """
    contest = race(case, yardstick)
    contest.warm_up(2)
    timings = contest.run(effort.seconds, effort.min_rounds, effort.max_rounds, on_round)
    return summarise(case, timings, yardstick)


def settle_allocator() -> None:
    """Bring the C allocator to the state that a training process reaches by itself.

    glibc raises its thresholds for keeping memory when a block of up to 32 MiB is first freed.
    Before that, torch's out-of-place steps return their temporaries to the system at every call and
    fault them in again, which made the default AdamW up to four times slower, on some runs only.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
