"""The package without its compiled extension, as its pure wheel has it: it imports, trains and says what runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.packaging.installed_package import PACKAGE, run_python

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

TRAINING = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import steadygrad as sg
    import steadygrad.nn
import torch
from sklearn.datasets import load_digits

data = load_digits()
inputs, labels = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
model = sg.nn.convert_batchnorm(model)
optimizer = sg.optim.AdamW(model.named_parameters(), lr=0.01, clip=sg.ClipPercentile(90), l2=1e-4)
for step in range(120):
    chosen = torch.randint(len(labels), (64,))
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(inputs[chosen] * (1e30 if step == 50 else 1)), labels[chosen])
    (loss * float("nan") if step == 60 else loss).backward()
    optimizer.step()
model.eval()
for function in (sg.add_penalty_, sg.soft_threshold_):
    function(model.parameters(), 1e-6)
norm = sg.clip_grad_norm_(model.parameters(), 1.0)
print(json.dumps({
    "module": sg._kernels.__name__,
    "warnings": [str(warning.message) for warning in caught],
    "path": optimizer.path,
    "accuracy": (model(inputs).argmax(1) == labels).float().mean().item(),
    "skipped": optimizer.skipped_steps,
    "clipped": optimizer.clipped_steps,
    "report": str(optimizer.report()),
    "norm": norm.item(),
}))
"""


class Installation:
    """A folder with the package, without its extension or with one that cannot be loaded."""

    def __init__(self, folder: Path, broken: bool = False) -> None:
        self.folder = folder
        self.package = folder / "steadygrad"
        shutil.copytree(
            PACKAGE, self.package, ignore=shutil.ignore_patterns("_kernels*.so", "__pycache__")
        )
        if broken:
            (self.package / "_kernels.abi3.so").write_bytes(b"not a library")

    def run(self, *argv: str) -> CompletedProcess[str]:
        return run_python(self.folder, *argv)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("sklearn")
    installation = Installation(tmp_path_factory.mktemp("training"))
    result = installation.run("-W", "error", "-c", TRAINING)
    assert result.returncode == 0, result.stderr
    return {**json.loads(result.stdout), "package": str(installation.package)}


def test_the_import_warns_once_and_says_what_to_do(training: dict[str, Any]) -> None:
    assert training["module"] == "steadygrad.without_kernels"
    (warning,) = training["warnings"]
    assert warning.startswith(
        f"steadygrad has no compiled extension ({training['package']} has none for Python {PYTHON}): torch's own"
    )
    assert warning.endswith("python -m steadygrad says how to get kernels")


def test_digits_are_learnt(training: dict[str, Any]) -> None:
    assert training["path"] == "in-place: there is no compiled extension"
    assert training["accuracy"] > 0.9
    assert training["skipped"] == 1 and training["clipped"] > 0
    assert "skipped   1 steps" in training["report"]
    assert training["norm"] > 0


def test_the_doctor_says_what_runs(tmp_path: Path) -> None:
    result = Installation(tmp_path).run("-m", "steadygrad", "doctor")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"none: {tmp_path}/steadygrad has none for Python {PYTHON}\n" in result.stdout
    for line in ("functions ", "Stabilizer, optim  in place", "batch norm  ", "to get kernels "):
        assert f"\n  {line}" in result.stdout
    assert result.stdout.endswith("There are no kernels to check.\nAll is well.\n")


def test_the_doctor_finds_an_extension_that_cannot_be_loaded(tmp_path: Path) -> None:
    result = Installation(tmp_path, broken=True).run("-m", "steadygrad")
    assert (result.returncode, result.stderr) == (1, "")
    assert "it cannot be loaded: " in result.stdout and "file too short" in result.stdout
    assert result.stdout.endswith(
        "What is wrong and what to do:\n"
        "- file: reinstall it; in a clone: pip install --force-reinstall --no-deps .\n"
    )
