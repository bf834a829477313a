"""The backends over which every test of an operation runs. A new backend is added in this file alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from steadygrad import _kernels, without_kernels


@dataclass(frozen=True)
class Backend:
    """An implementation of the kernels, and the device on which a test puts its tensors to use it."""

    name: str
    device: torch.device

    def __str__(self) -> str:
        return self.name

    @property
    def asynchronous(self) -> bool:
        """Tell whether the device decides about steps, so that the host learns of it only by waiting."""
        return self.name in ("emulated", "cuda")

    @property
    def fused_path(self) -> str:
        """Return the ``path`` of an optimizer whose rule has a kernel."""
        return "in-place: there is no compiled extension" if self.name == "composite" else "fused"

    def why_not(self) -> str | None:
        """Return why the backend cannot be used here, or None if it can."""
        if self.name == "emulated" and importlib.util.find_spec("steadygrad_emulated") is None:
            return "steadygrad_emulated is not installed: build with STEADYGRAD_EMULATION=ON, as make test does"
        if self.name == "cuda":
            cuda = _kernels.build_info()["cuda"]
            if not torch.cuda.is_available():
                return "no GPU that torch can use"
            if not cuda["compiled"]:
                return "built without CUDA"
        return None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the real kernels by the emulated ones, or by none, while the context is active."""
        if self.name not in ("emulated", "composite"):
            yield
            return
        others: Any = without_kernels
        if self.name == "emulated":
            others = importlib.import_module("steadygrad_emulated")
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in vars(_kernels) if not name.startswith("__")]:
                if hasattr(others, name):
                    patch.setattr(_kernels, name, getattr(others, name))
                else:
                    patch.delattr(_kernels, name)
            yield


BACKENDS = [
    Backend("cpu", torch.device("cpu")),
    Backend("emulated", torch.device("cpu")),
    Backend("cuda", torch.device("cuda")),
]
# No kernels: torch's operations, which the tests of conftest.COMPOSITE_FILES run over as well.
COMPOSITE = Backend("composite", torch.device("cpu"))


MARKS = {
    "cpu": (),
    "composite": (pytest.mark.composite,),
    "emulated": (pytest.mark.emulated,),
    "cuda": (pytest.mark.gpu,),
}


def backend_parameters(backends: list[Backend]) -> list[Any]:
    """Return the parameters of a test that runs over these backends, each with its marker.

    Without a GPU there are no cases for it, instead of thousands that are skipped.
    """
    return [
        pytest.param(backend, marks=MARKS[backend.name], id=backend.name)
        for backend in backends
        if backend.name != "cuda" or backend.why_not() is None
    ]


# The fixture is made once per session, because hypothesis refuses fixtures that are made for every test function.
@pytest.fixture(scope="session", params=backend_parameters([*BACKENDS, COMPOSITE]))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return one backend after the other."""
    chosen: Backend = request.param
    why_not = chosen.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    return chosen


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Activate the kernels of the test's backend; a test without one uses those of the package."""
    if "backend" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("backend").active():
        yield
