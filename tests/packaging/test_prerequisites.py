"""What the package and its command line say if torch or NumPy is missing or does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from steadygrad import prerequisites
from tests.packaging.installed_package import PACKAGE, run_python

MISSING = "raise ModuleNotFoundError(\"No module named '{0}'\", name='{0}')\n"

# For each state: modules that replace the real ones, and the message.
STATES: dict[str, tuple[dict[str, str], str]] = {
    "no torch": (
        {"torch": MISSING.format("torch")},
        "steadygrad needs torch, which is not installed: pip install 'torch>=2.10'",
    ),
    "broken torch": (
        {"torch": "raise OSError('libcudart.so.13: cannot open shared object file')\n"},
        "steadygrad needs torch, which cannot be imported (libcudart.so.13: cannot open shared object file). "
        "Reinstall it: pip install --force-reinstall 'torch>=2.10'",
    ),
    "torch 2.9": (
        {"torch": "__version__ = '2.9.1+cu128'\n"},
        "steadygrad needs torch 2.10 or later, this is 2.9.1+cu128: pip install 'torch>=2.10'",
    ),
    "no NumPy": (
        {"torch": "__version__ = '2.13.0'\n", "numpy": MISSING.format("numpy")},
        "steadygrad needs numpy, which is not installed: pip install 'numpy'",
    ),
}


class Installation:
    """A folder with our Python files, and replacements for what we import."""

    def __init__(self, folder: Path, state: str) -> None:
        modules, self.message = STATES[state]
        self.folder = folder
        self.package = folder / "steadygrad"
        self.package.mkdir()
        for file in PACKAGE.glob("*.py"):
            (self.package / file.name).write_bytes(file.read_bytes())
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)

    def run(self, *argv: str) -> CompletedProcess[str]:
        return run_python(self.folder, *argv)


@pytest.mark.parametrize("state", STATES)
def test_import_says_once_what_is_wrong(tmp_path: Path, state: str) -> None:
    installation = Installation(tmp_path, state)
    result = installation.run("-c", "import steadygrad")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ImportError: {installation.message}"
    assert result.stderr.count("Error: ") == 1, result.stderr


@pytest.mark.parametrize("state", STATES)
def test_doctor_says_what_the_import_says(tmp_path: Path, state: str) -> None:
    installation = Installation(tmp_path, state)
    result = installation.run("-m", "steadygrad", "doctor")
    assert (result.returncode, result.stderr) == (1, "")
    assert "The kernels were not checked" in result.stdout
    assert result.stdout.endswith(f"What is wrong and what to do:\n- {installation.message}\n")
    assert result.stdout.count(installation.message) == 1


def test_command_line_works_without_the_package(tmp_path: Path) -> None:
    installation = Installation(tmp_path, "torch 2.9")
    script = tmp_path / "bin" / "steadygrad"
    script.parent.mkdir()
    script.write_text("from steadygrad.doctor import main\nraise SystemExit(main())\n")
    doctor = installation.run(str(script), "doctor")
    assert (doctor.returncode, doctor.stderr) == (1, "")
    assert f"- {installation.message}\n" in doctor.stdout
    assert "  torch       2.9.1+cu128\n" in doctor.stdout
    version = installation.run("-m", "steadygrad", "--version")
    assert (version.returncode, version.stderr) == (0, "")


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m"], ["python", "-m", "steadygrad"], True),
        (["-m", "doctor"], ["python", "-X", "dev", "-m", "steadygrad", "doctor"], True),
        (["bin/steadygrad", "doctor"], ["python", "bin/steadygrad", "doctor"], True),
        (["-m", "steadygrad"], ["python", "-m", "training", "steadygrad"], False),
        (["-c", "steadygrad"], ["python", "-c", "import steadygrad", "steadygrad"], False),
        (["train.py"], ["python", "train.py"], False),
        ([""], ["python"], False),
    ],
)
def test_only_our_command_line_runs_as_the_program(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], orig_argv: list[str], expected: bool
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert prerequisites.runs_as_program() is expected


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("1.13.1", False),
        ("2.9.1", False),
        ("2.10.0", True),
        ("2.10.0a0+gitabcdef1", True),
        ("2.15.0+cu130", True),
        ("3.0.0", True),
    ],
)
def test_torch_is_taken_from_2_10_on(
    monkeypatch: pytest.MonkeyPatch, version: str, accepted: bool
) -> None:
    monkeypatch.setattr("torch.__version__", version)
    assert prerequisites.find_problem() == (
        ""
        if accepted
        else f"steadygrad needs torch 2.10 or later, this is {version}: pip install 'torch>=2.10'"
    )
