"""Two ranks with sharded parameters record the norms of whole parameters, as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steadygrad as sg
from steadygrad.telemetry.history import TOTALS
from tests.ranks import found
from tests.telemetry.telemetry_rank import (
    BACKENDS_RUN,
    BAD_STEP,
    SCOPES,
    SHAPES,
    STEPS,
    gradients,
    in_groups,
    is_bad,
)

SCRIPT = Path(__file__).with_name("telemetry_rank.py")
TIME_LIMIT = 90.0


def of_one_process(scope: Any) -> sg.History:
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    opt = sg.optim.SGD(in_groups(params), lr=0.1, clip_scope=scope, telemetry="tensor")
    for step in range(STEPS):
        for i, (param, grad) in enumerate(zip(params, gradients(step), strict=True)):
            if is_bad(step, i):
                grad[-1, -1] = torch.nan
            param.grad = grad
        opt.step()
    history: sg.History = opt.report().history
    return history


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend_name", [backend.name for backend in BACKENDS_RUN])
def test_ranks_record_what_one_process_records(backend_name: str, scope: str) -> None:
    whole = of_one_process(scope)
    ranks = found(SCRIPT, 2, TIME_LIMIT, f"{backend_name}-{scope}")
    first, second = (sg.History(0, rank["rows"].numpy(), whole.names) for rank in ranks)
    np.testing.assert_array_equal(first._rows, second._rows)
    np.testing.assert_allclose(first._rows, whole._rows, rtol=1e-12)
    assert first._rows.shape == (STEPS, TOTALS + 2 * len(SHAPES))
    assert np.flatnonzero(first.skipped).tolist() == [BAD_STEP]
    assert first.tensor_nonfinite[BAD_STEP].tolist() == [1, 0, 0]
