"""The backends that every test of an operation runs over. A new backend is added here alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Backend:
    """Where a test puts its tensors, so that the operation runs on this backend."""

    name: str
    device: torch.device

    def __str__(self) -> str:
        return self.name


BACKENDS = [Backend("cpu", torch.device("cpu"))]


# Session-wide, because hypothesis refuses fixtures that are set up once per test function.
@pytest.fixture(scope="session", params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    """One backend after the other."""
    chosen: Backend = request.param
    return chosen
