"""clip_grad_norm_, clip active and inactive, against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.case import Case
from benchmarks.cases import cases_of


@pytest.mark.parametrize(
    "case", cases_of("clip_active", "clip_inactive"), ids=lambda case: case.key
)
def test_speed_clip_grad_norm(case: Case, side_by_side: Callable[[Case], None]) -> None:
    side_by_side(case)
