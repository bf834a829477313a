"""What the cases of one group say together: geometric means of the ratios, and the slowest case."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.measure import CaseResult

# Stands for the fastest peer of each case.
FASTEST = "fastest of torch's"


@dataclass(frozen=True)
class Summary:
    """Ours against one peer over the cases of a group that were measured.

    Attributes:
        group: of the cases.
        title: of the cases, for people.
        peer: name of the peer, or `FASTEST`.
        cases: how many had that peer.
        mean: geometric mean of the ratios.
        least: smallest ratio.
        least_case: key of the case that has it.
    """

    group: str
    title: str
    peer: str
    cases: int
    mean: float
    least: float
    least_case: str


def summaries(results: Iterable[CaseResult]) -> list[Summary]:
    """One per group and peer, and one for the fastest peer where there are several.

    Only groups whose cases are of one kind have any.
    """
    groups: dict[str, list[CaseResult]] = {}
    for result in results:
        if result.case.averaged and result.peers:
            groups.setdefault(result.case.group, []).append(result)
    return [summary for members in groups.values() for summary in _of_group(members)]


def _of_group(members: list[CaseResult]) -> list[Summary]:
    ratios: dict[str, dict[str, float]] = {}
    for result in members:
        for peer in result.peers:
            ratios.setdefault(peer.timing.name, {})[result.case.key] = peer.ratio
        fastest = min(peer.ratio for peer in result.peers)
        ratios.setdefault(FASTEST, {})[result.case.key] = fastest
    # The fastest comes last, and says nothing new where there is one peer.
    ratios[FASTEST] = ratios.pop(FASTEST)
    if len(ratios) == 2:
        del ratios[FASTEST]
    case = members[0].case
    return [_of_peer(case.group, case.title, peer, found) for peer, found in ratios.items()]


def _of_peer(group: str, title: str, peer: str, ratios: dict[str, float]) -> Summary:
    least_case = min(ratios, key=ratios.__getitem__)
    mean = statistics.geometric_mean(ratios.values())
    return Summary(group, title, peer, len(ratios), mean, ratios[least_case], least_case)
