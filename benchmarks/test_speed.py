"""Every case on the CPU, for pytest-benchmark: `python -m pytest benchmarks -k adamw`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.case import Case
from benchmarks.cases import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_speed(case: Case, side_by_side: Callable[[Case], None]) -> None:
    side_by_side(case)
