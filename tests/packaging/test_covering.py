"""Covering sets hold every pair of values, in few cases."""

from __future__ import annotations

import itertools

import pytest

from tests.covering import covering


@pytest.mark.parametrize(
    ("sizes", "most"), [((2, 2), 4), ((10, 2, 2, 3, 2), 33), ((2,) * 7, 10), ((3, 4, 5), 25)]
)
def test_every_pair_is_there(sizes: tuple[int, ...], most: int) -> None:
    cases = [list(enumerate(case)) for case in itertools.product(*map(range, sizes))]
    chosen = covering(cases)
    pairs, kept = (
        {pair for index in indices for pair in itertools.combinations(cases[index], 2)}
        for indices in (range(len(cases)), chosen)
    )
    assert kept == pairs
    assert len(chosen) <= most


def test_cases_without_pairs_are_kept() -> None:
    assert covering([["a"], ["b"], [], ["a", "b"], ["a", "b"]]) == {0, 1, 2, 3}
