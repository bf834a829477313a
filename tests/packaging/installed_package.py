"""Runs Python over a folder with a copy of the package, as if it were installed there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import steadygrad

PACKAGE = Path(steadygrad.__file__).parent


def run_python(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter in a folder whose packages and modules come before all others."""
    return subprocess.run(
        [sys.executable, *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
