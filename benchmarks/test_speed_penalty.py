"""add_penalty_ against autograd, a loop, and foreach calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.case import Case
from benchmarks.cases import cases_of


@pytest.mark.parametrize("case", cases_of("add_penalty"), ids=lambda case: case.key)
def test_speed_penalty(case: Case, side_by_side: Callable[[Case], None]) -> None:
    side_by_side(case)
