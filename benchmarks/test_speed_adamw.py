"""Clip and AdamW, wrapped and in one class, against torch's clip and its three kinds of AdamW."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.case import Case
from benchmarks.cases import cases_of


@pytest.mark.parametrize("case", cases_of("adamw", "optim_adamw"), ids=lambda case: case.key)
def test_speed_adamw(case: Case, side_by_side: Callable[[Case], None]) -> None:
    side_by_side(case)
