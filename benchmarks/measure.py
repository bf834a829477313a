"""Runs cases: races the candidates beside a copy of memory and derives the numbers."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.case import Build, Case
from benchmarks.timer import (
    Candidate,
    Race,
    Timing,
    quartiles,
    ratio,
    rotating,
    round_ratios,
)

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
# A GPU is steadier than a shared host, and a lap there is many calls.
CUDA_QUICK = Effort(seconds=0.5, min_rounds=5, max_rounds=50)
CUDA_FULL = Effort(seconds=1.0, min_rounds=7, max_rounds=75)


@dataclass(frozen=True)
class CopyBandwidth:
    """The memory bandwidth that torch reaches with the same threads, in GB/s.

    Attributes:
        copy: `target.copy_(source)`, counted as 8 bytes an fp32 element: one read, one write.
        scale: `target.mul_(x)` in place, counted alike; None on a GPU.
    """

    copy: float
    scale: float | None = None

    @property
    def yardstick(self) -> float:
        """The larger of the two; what "share of copy" is a share of.

        A CPU's copy reads the destination's cache lines before it overwrites them unless it uses
        streaming stores, so it may move 12 bytes where 8 are counted. An in-place scaling really
        moves 8. Taking the larger is the stricter yardstick on every such machine.
        """
        return self.copy if self.scale is None else max(self.copy, self.scale)


class CopyYardstick:
    """Two plain copies of memory that take part in every race of a memory-bound case.

    They measure the bandwidth in the same rounds as the candidates, so that a machine that slows
    down for a minute slows the yardstick too. And they flush the caches once a round: each
    candidate finds its buffers cold when its turn comes again.
    """

    candidates: tuple[Candidate, ...]

    def __init__(self, cache_bytes: int) -> None:
        """Reserve the buffers.

        Args:
            cache_bytes: size of the last-level cache; each of the two buffers is at least four
                times as large, and at least 256 MiB.
        """
        elements = max(_SMALLEST_BUFFER // 4, cache_bytes)
        source, target = torch.ones(elements), torch.ones(elements)
        self._evicting = source[:cache_bytes]
        self.buffer_bytes = 4 * elements
        self.candidates = (
            Candidate("copy_", lambda: target.copy_(source)),
            Candidate("mul_", lambda: target.mul_(1.0)),
        )

    def joins(self, case: Case) -> bool:
        """Whether it takes part in the race of `case`: not where the host's work is the bound."""
        return not case.host_cost

    def flush(self) -> None:
        """Read four times the cache, so that no candidate finds in it what another has freed."""
        self._evicting.sum()

    def bandwidth(self, timings: Sequence[Timing]) -> CopyBandwidth:
        """The bandwidth from the laps of `candidates`, in their order."""
        moved = 2 * self.buffer_bytes / 1e9
        return CopyBandwidth(*(moved / _busy(timing).median for timing in timings))

    def measure(self, effort: Effort, race: Race) -> CopyBandwidth:
        """Run `race`, which is between the yardstick's candidates alone."""
        race.warm_up(1)
        race.calibrate()
        return self.bandwidth(race.run(effort.seconds, effort.min_rounds, effort.max_rounds))


class GpuYardstick(CopyYardstick):
    """torch's copy of 2^28 fp32 elements on the GPU, in every race: no case is without a share."""

    def __init__(self, device: torch.device, elements: int = 2**28) -> None:
        """Reserve the buffers.

        Args:
            device: where.
            elements: of each of the two fp32 buffers.
        """
        source, target = torch.randn(elements, device=device), torch.ones(elements, device=device)
        self.buffer_bytes = 4 * elements
        self.candidates = (Candidate("copy_", lambda: target.copy_(source)),)

    def joins(self, case: Case) -> bool:
        """Always."""
        return True

    def flush(self) -> None:
        """Nothing: a lap is many calls of one candidate, which take turns over sets of buffers."""


def _busy(timing: Timing) -> Timing:
    """The laps in which the memory was busy: by the GPU's clock where there is one."""
    return timing.counting("device") if timing.device else timing


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
        bandwidth: the copy bandwidth in the same race; None for a case of host cost on the CPU.
        clock: "wall" or "device": the clock whose laps count.
        buffer_sets: sets of buffers that every candidate has called over.
        unavailable: why peers are missing that this torch does not have.
    """

    case: Case
    ours: Timing
    peers: tuple[PeerResult, ...]
    bandwidth: CopyBandwidth | None
    clock: str = "wall"
    buffer_sets: int = 1
    unavailable: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """The case's `floor_bytes` over our median time, on a GPU the median GPU time.

        Passes that find data in cache can lift it above the copy bandwidth.
        """
        return self.case.floor_bytes / _busy(self.ours).median / 1e9

    @property
    def share_of_copy(self) -> float | None:
        """`gigabytes_per_second` over the copy bandwidth; None where that was not measured."""
        if self.bandwidth is None:
            return None
        return self.gigabytes_per_second / self.bandwidth.yardstick

    @property
    def nanoseconds_per_tensor(self) -> float:
        """Our median time over the number of tensors: the cost of a tensor when data is small."""
        return self.ours.median / self.case.tensors * 1e9


@dataclass(frozen=True)
class Ground:
    """Where a race takes place.

    Attributes:
        device: where the tensors live.
        race: makes the race from its candidates.
        sets: how many sets of buffers a candidate has in a case.
        over: makes one candidate of those over each set.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    race: Callable[[Sequence[Candidate]], Race] = Race
    sets: Callable[[Case], int] = lambda case: 1
    over: Callable[[Sequence[Candidate]], Candidate] = rotating


class Contest:
    """The race of one case: ours, the peers that this torch has, and the yardstick."""

    def __init__(self, case: Case, yardstick: CopyYardstick, ground: Ground | None = None) -> None:
        """Build the candidates, each over buffers of its own, and call each once.

        Args:
            case: what is measured.
            yardstick: takes part where memory is the bound.
            ground: where; the CPU by default.
        """
        self._ground = ground or Ground()
        self.case = case
        self.buffer_sets = self._ground.sets(case)
        self._yardstick = yardstick
        unavailable = []
        build_ours, *build_peers = case.builds
        candidates = [self._candidate(build_ours)]
        for build in build_peers:
            try:
                candidates.append(self._candidate(build))
            except (NotImplementedError, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                unavailable.append(f"{type(error).__name__}: {reason}")
        self.unavailable = tuple(unavailable)
        if yardstick.joins(case):
            candidates.extend(yardstick.candidates)
        self.race = self._ground.race(candidates)

    def _candidate(self, build: Build) -> Candidate:
        sets = [build(self._ground.device) for _ in range(self.buffer_sets)]
        for candidate in sets:
            candidate.prepare()
            candidate.run()
        over_all = self._ground.over(sets)
        if self.case.allocates:
            return replace(over_all, prepare=self._yardstick.flush)
        return over_all

    def warm_up(self) -> None:
        """Two untimed calls of every candidate, and as many as the race needs to know its lap."""
        self.race.warm_up(2)
        self.race.calibrate()

    def result(self) -> CaseResult:
        """The numbers from the laps so far."""
        return summarise(
            self.case,
            self.race.timings(),
            self._yardstick,
            buffer_sets=self.buffer_sets,
            unavailable=self.unavailable,
        )


def summarise(
    case: Case,
    timings: Sequence[Timing],
    yardstick: CopyYardstick,
    *,
    buffer_sets: int = 1,
    unavailable: tuple[str, ...] = (),
) -> CaseResult:
    """The numbers of a case from the laps of its race, the yardstick's last."""
    joined = len(yardstick.candidates) if yardstick.joins(case) else 0
    count = len(timings) - joined
    clock = case.clock if timings[0].device else "wall"
    ours, *others = (
        timing.counting(clock) if timing.device else timing for timing in timings[:count]
    )
    peers = []
    for peer in others:
        per_round = round_ratios(peer, ours)
        peers.append(
            PeerResult(peer, ratio(peer, ours), statistics.median(per_round), quartiles(per_round))
        )
    bandwidth = yardstick.bandwidth(timings[count:]) if joined else None
    return CaseResult(case, ours, tuple(peers), bandwidth, clock, buffer_sets, unavailable)


def measure_case(
    case: Case,
    effort: Effort,
    yardstick: CopyYardstick,
    on_round: Callable[[], object],
    ground: Ground | None = None,
) -> CaseResult:
    """Measure one case.

    Args:
        case: what to measure.
        effort: for how long.
        yardstick: takes part in the race where memory is the bound.
        on_round: called between rounds, outside the timed region.
        ground: where; the CPU by default.
    """
    contest = Contest(case, yardstick, ground)
    contest.warm_up()
    contest.race.run(effort.seconds, effort.min_rounds, effort.max_rounds, on_round)
    return contest.result()


# glibc's names for what `mallopt` sets, and the largest threshold that it reaches by itself.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def settle_allocator() -> None:
    """Let the C allocator keep what is freed, as far as a training process would.

    glibc raises its threshold for blocks of their own, by itself, when one of up to 32 MiB is first
    freed. It still returns the end of the heap to the system whenever 64 MiB of it are free, and
    which candidate that happens to is luck: some fault the same pages in again at every call, which
    makes them up to four times slower, and others never.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        torch.empty(31 * 2**20, dtype=torch.uint8)
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
