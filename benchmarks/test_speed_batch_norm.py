"""Batch norm, with ReLU and with a sum before it, against torch's module and the calls behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.batch_norm import cpu_cases
from benchmarks.case import Case


@pytest.mark.parametrize("case", tuple(cpu_cases()), ids=lambda case: case.key)
def test_speed_batch_norm(case: Case, side_by_side: Callable[[Case], None]) -> None:
    side_by_side(case)
