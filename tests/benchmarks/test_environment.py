"""Tests what a result file says about the measured source and machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, measure


def test_a_device_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    info: dict[str, Any] = {}
    monkeypatch.setattr(environment, "cuda_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(measure.DeviceUnusable, match="--device cuda: steadygrad was built without"):
        measure.CudaDevice()
    info.update(architectures="sm_80", devices=[{"usable": False}], problem="no NVIDIA driver")
    assert environment.cuda_problem() == "no NVIDIA driver"
    info["problem"] = ""
    assert "is it a build for the CPU?" in environment.cuda_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert environment.cuda_problem().startswith("the kernels were compiled for sm_80")
    info["devices"][0]["usable"] = True
    assert environment.cuda_problem() == ""


def commit(folder: Path) -> None:
    for arguments in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "x"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def names(folder: Path) -> list[str]:
    """Return the hash of the commit, and of its tree of kernels."""
    command = ["git", "rev-parse", "HEAD", "HEAD:csrc"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "csrc" / "core").mkdir(parents=True)
    (folder / "csrc" / "core" / "norm.h").write_text("int norm;\n")
    # git sorts the folder core as "core/", which comes after "core.h".
    (folder / "csrc" / "core.h").write_text("int core;\n")
    (folder / "csrc" / "run").write_text("#!/bin/sh\n")
    (folder / "csrc" / "run").chmod(0o755)
    (folder / "pyproject.toml").write_text('[project]\nname = "steadygrad"\n')
    return folder


def test_the_source_is_named_as_git_names_it(checkout: Path) -> None:
    commit(checkout)
    revision, tree = names(checkout)
    found = environment.this_source(checkout)
    assert found == {"revision": revision, "csrc_tree": tree, "csrc_state": "committed"}
    (checkout / "csrc" / "core" / "norm.h").write_text("int changed;\n")
    changed = environment.this_source(checkout)
    assert changed["revision"] == f"{revision}-dirty"
    assert changed["csrc_state"] == "uncommitted changes"
    commit(checkout)
    assert changed["csrc_tree"] == names(checkout)[1]


def test_a_source_without_history_says_what_it_can(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(environment.REVISION_VARIABLE, raising=False)
    found = environment.this_source(checkout)
    assert (found["revision"], found["csrc_state"]) == ("unknown", "unknown")
    assert found["csrc_tree"] == environment.tree_name(checkout / "csrc").hex() != ""
    monkeypatch.setenv(environment.REVISION_VARIABLE, "abc")
    assert environment.this_source(checkout)["revision"] == "abc"
    # The commit of another repository around the checkout is not that of the checkout.
    commit(tmp_path)
    assert environment.this_source(checkout)["revision"] == "abc"


def test_a_process_that_computes_keeps_a_core_busy() -> None:
    endless = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(endless) as process:
        try:
            time.sleep(0.2)
            assert environment.busy_cores() > 0.7
        finally:
            process.kill()
    assert 0 <= environment.busy_cores() <= (os.cpu_count() or 1)


def test_the_machine_is_written_as_json(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    subprocess.run([sys.executable, "-m", "benchmarks.environment", str(file)], check=True)
    found = json.loads(file.read_text())
    assert found["torch"] == torch.__version__ and found["csrc_tree"] and found["revision"]
