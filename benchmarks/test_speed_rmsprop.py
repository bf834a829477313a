"""Clip and RMSprop against torch's clip and its RMSprop."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.case import Case
from benchmarks.cases import cases_of


@pytest.mark.parametrize("case", cases_of("rmsprop"), ids=lambda case: case.key)
def test_speed_rmsprop(case: Case, side_by_side: Callable[[Case], None]) -> None:
    side_by_side(case)
