"""Seeds, markers, and which cases run on which backend."""

from __future__ import annotations

import gc
import os
import random
from collections import defaultdict
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from tests.backends import BACKENDS, Backend
from tests.backends import backend as backend  # the fixtures, for every test file
from tests.backends import kernels as kernels
from tests.covering import covering
from tests.digit_training import one_thread as one_thread

SEED = 20240229
ROOT = Path(__file__).resolve().parents[1]

# Programs that tests start can import the same modules: tests, study and benchmarks.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Examples are derived from each test's source, so that every run draws the same ones.
hypothesis.settings.register_profile("steadygrad", derandomize=True, deadline=None)
# If time is short, as on a borrowed GPU, the first failing example is enough: pytest --hypothesis-profile gpu.
hypothesis.settings.register_profile(
    "gpu", derandomize=True, deadline=None, max_examples=30, phases=["explicit", "generate"]
)
hypothesis.settings.load_profile("steadygrad")


# The markers of whole files; tests over backends get theirs from backends.py.
MARKED_FILES = {
    "ranks": ("*_ranks.py", "distributed/test_sharded*.py", "nn/test_batch_norm_synchronized.py"),
    "compile": ("nn/test_batch_norm_compile.py", "emulation/test_emulator.py"),
    "integration": (
        *("integrations/test_*.py", "study/test_runner.py", "packaging/test_doctor.py"),
        "packaging/test_without_extension.py",
        *("benchmarks/test_gpu_script.py", "*/test_command_line.py"),
    ),
    "slow": ("nn/test_batch_norm_kernels_accuracy.py", "nn/test_convert_batchnorm_networks.py"),
    "full": (
        *("examination/test_restoring.py", "examination/test_sharpness.py"),
        *("nn/test_batch_norm_export.py", "nn/test_batch_norm_operators.py"),
        *("nn/test_convert_batchnorm_blocks.py", "reference/test_rules.py", "study/test_page.py"),
    ),
    "gpu": ("optim/test_device_streams.py", "policies/test_policy_graphs.py"),
}

# The files whose tests also run over the composite backend, but for those that are marked to need kernels.
COMPOSITE_FILES = (
    "clip/test_clip.py",
    "clip/test_returned_norms.py",
    "distributed/test_reduction.py",
    "optim/test_accumulation.py",
    "optim/test_composite_steps.py",
    "optim/test_grad_scaler.py",
    "optim/test_in_place_*.py",
    "optim/test_limits.py",
    "optim/test_lr_backoff.py",
    "optim/test_step_reference.py",
    "penalty/test_penalty.py",
    "policies/test_*.py",
    "telemetry/test_*.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of MARKED_FILES, and leave out tests for a GPU where there is none."""
    for item in items:
        for marker, patterns in MARKED_FILES.items():
            if is_one_of(item.path, patterns):
                item.add_marker(marker)
    left_out = redundant_cases(items) | {item for item in items if needs_kernels(item)}
    if BACKENDS[-1].why_not() is not None:
        left_out |= {item for item in items if item.get_closest_marker("gpu")}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
    # The tests that take longest begin first, so that parallel processes end at about the same time.
    items.sort(key=lambda item: not any(item.get_closest_marker(m) for m in MARKED_FILES))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going over all collected tests again and again."""
    gc.collect()
    gc.freeze()


def needs_kernels(item: pytest.Item) -> bool:
    """Tell whether a case of the composite backend is one of a test about kernels."""
    if not item.get_closest_marker("composite"):
        return False
    is_taken = is_one_of(item.path, COMPOSITE_FILES)
    return not is_taken or item.get_closest_marker("kernels") is not None


@cache
def is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    """Tell whether the path of a test file, from this folder on, matches one of the patterns."""
    name = path.relative_to(ROOT / "tests").as_posix()
    return any(fnmatch(name, pattern) for pattern in patterns)


def redundant_cases(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the cases that would find nothing that other cases do not find.

    The full product of a test's parameters runs on the CPU, and on the other backends so many cases that every pair of
    parameters' values occurs (see covering.py). A test that does not depend on the backend (``once``) runs on the CPU
    alone; a test that takes long (``pairs``) is thinned on the CPU, too. Tests of four ranks run on the CPU alone.
    """
    thinned: defaultdict[Any, list[tuple[pytest.Item, list[Any]]]] = defaultdict(list)
    redundant = set()
    for item in items:
        on_another_backend = any(
            item.get_closest_marker(name) for name in ("composite", "emulated", "gpu")
        )
        if on_another_backend and (item.get_closest_marker("once") or _has_four_ranks(item)):
            redundant.add(item)
        elif on_another_backend or item.get_closest_marker("pairs"):
            backends, values = _parameters(item)
            thinned[(item.path, item.originalname, *backends)].append((item, values))
    for cases in thinned.values():
        kept = covering([values for _, values in cases])
        redundant |= {item for index, (item, _) in enumerate(cases) if index not in kept}
    return redundant


def _has_four_ranks(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("world") == 4


def _parameters(item: pytest.Item) -> tuple[list[str], list[Any]]:
    """Return the backends of a case and the values of its other parameters; those given together count as one."""
    parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    names = [_names(mark) for mark in item.iter_markers("parametrize")]
    names += [(name,) for name in parameters if not any(name in group for group in names)]
    backends, values = [], []
    for group in names:
        given = [parameters[name] for name in group if name in parameters]
        if any(isinstance(value, Backend) for value in given):
            backends += [str(value) for value in given]
        else:
            # Some values cannot be hashed, but each of them is the same object in all cases.
            values.append((*group, *map(id, given)))
    return backends, sorted(values, key=str)


def _names(parametrize: pytest.Mark) -> tuple[str, ...]:
    names = parametrize.args[0]
    return (
        tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
    )


def pytest_report_header() -> str:
    """Say which backends the tests run over, and why one is left out."""
    return "backends: " + "; ".join(
        backend.name if (why := backend.why_not()) is None else f"{backend.name} left out: {why}"
        for backend in BACKENDS
    )


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator before each test, so that the order of the tests does not matter."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Return a NumPy generator for the inputs of one test."""
    return np.random.default_rng(seed)
