"""Checks what the package cannot be imported without: torch, NumPy and the compiled extension."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module

REINSTALL = "reinstall it; in a clone: pip install --force-reinstall --no-deps ."


def find_problem() -> str:
    """Says what keeps the package from working and the one thing to do; returns "" if nothing does."""
    return (
        _import_problem("torch", "torch>=2.10")  # Loads the OpenMP copy that the kernels use.
        or _torch_version_problem()
        or _import_problem("numpy", "numpy")
        or _extension_problem()
    )


def runs_as_program() -> bool:
    """Tells whether Python is starting ``python -m steadygrad`` or the script ``steadygrad``."""
    program = sys.argv[0]
    if program == "-m":  # Python leaves "-m" there until it has found the module.
        program = sys.orig_argv[-len(sys.argv)]
    return os.path.basename(program) == "steadygrad"


def _import_problem(module: str, requirement: str) -> str:
    try:
        import_module(module)
    except Exception as error:  # A broken install raises more than ImportError.
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"steadygrad needs {module}, which is not installed: pip install '{requirement}'"
        reason = str(error).partition("\n")[0] or type(error).__name__
        return (
            f"steadygrad needs {module}, which cannot be imported ({reason}). "
            f"Reinstall it: pip install --force-reinstall '{requirement}'"
        )
    return ""


def _torch_version_problem() -> str:
    version = str(import_module("torch").__version__)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (2, 10):
        return ""
    return f"steadygrad needs torch 2.10 or later, this is {version}: pip install 'torch>=2.10'"


def _extension_problem() -> str:
    """Says why the compiled extension cannot be imported; returns "" if it can."""
    try:
        import_module("steadygrad._kernels")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            reason = f"{os.path.dirname(__file__)} has none for Python {python}"
        else:
            reason = f"it cannot be loaded: {error}"
        return f"steadygrad needs its compiled extension, but {reason}: {REINSTALL}"
    return ""
