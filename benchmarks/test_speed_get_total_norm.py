"""get_total_norm against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.case import Case
from benchmarks.cases import cases_of


@pytest.mark.parametrize("case", cases_of("total_norm"), ids=lambda case: case.key)
def test_speed_get_total_norm(case: Case, side_by_side: Callable[[Case], None]) -> None:
    side_by_side(case)
