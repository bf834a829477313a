"""Chooses few of many test cases, so that every pair of values still occurs together (all-pairs testing)."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from itertools import combinations


def covering(cases: Sequence[Sequence[Hashable]]) -> set[int]:
    """Return the indices of cases in which every pair of values occurs that occurs in all of them.

    The case with the most new pairs comes next, and the first of several: few cases are left, and the same ones in
    every process. Cases of fewer than two values are all kept.
    """
    pairs = [set(combinations(values, 2)) for values in cases]
    chosen = {index for index, own in enumerate(pairs) if not own}
    known: set[tuple[Hashable, Hashable]] = set()
    # A case never has more new pairs than when it was last looked at, so only the best one is counted again.
    best = [(-len(own), index) for index, own in enumerate(pairs) if own]
    heapq.heapify(best)
    while best:
        _, index = heapq.heappop(best)
        new = (-len(pairs[index] - known), index)
        if best and new > best[0]:
            heapq.heappush(best, new)
        elif new[0] < 0:
            chosen.add(index)
            known |= pairs[index]
        else:
            break
    return chosen
