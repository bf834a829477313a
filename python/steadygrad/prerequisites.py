"""Checks for torch and NumPy, which the package needs to be imported, and for the compiled extension."""

from __future__ import annotations

import os
import re
import sys
import warnings
from importlib import import_module

REINSTALL = "reinstall it; in a clone: pip install --force-reinstall --no-deps ."


def find_problem() -> str:
    """Returns what keeps the package from working and the one thing to do; "" if nothing does."""
    return (
        _import_problem("torch", "torch>=2.10")  # Loads the OpenMP copy that the kernels use.
        or _torch_version_problem()
        or _import_problem("numpy", "numpy")
        or _extension_refusal()
    )


def runs_as_program() -> bool:
    """Returns whether Python is starting ``python -m steadygrad`` or the script ``steadygrad``."""
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


def _extension_error() -> ImportError | None:
    try:
        import_module("steadygrad._kernels")
    except ImportError as error:
        return error
    return None


def _extension_refusal() -> str:
    """Returns why an extension that was found refused to load, such as for a setting; "" if it did not."""
    error = _extension_error()
    # Python's error for a missing or broken extension names the module or path; the extension's own names neither.
    if error is None or isinstance(error, ModuleNotFoundError) or error.path is not None:
        return ""
    return f"steadygrad's compiled extension does not run here: {error}"


def extension_problem() -> str:
    """Returns why there is no compiled extension; "" if there is one."""
    error = _extension_error()
    if error is None:
        return ""
    if isinstance(error, ModuleNotFoundError):
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"{os.path.dirname(__file__)} has none for Python {python}"
    return f"it cannot be loaded: {error}"


def do_without_extension(problem: str, warn: bool) -> None:
    """Replaces the compiled extension with a stand-in that has no kernels.

    Args:
        problem: Reason why there is no extension.
        warn: Whether to warn that there is none.
    """
    stand_in = import_module("steadygrad.without_kernels")
    stand_in.reason = problem  # type: ignore[attr-defined]
    sys.modules["steadygrad._kernels"] = stand_in
    vars(sys.modules["steadygrad"])["_kernels"] = stand_in
    if warn:
        warnings.warn(
            f"steadygrad has no compiled extension ({problem}): torch's own operations do its work, in more passes "
            "over memory and without fused steps. python -m steadygrad says how to get kernels",
            RuntimeWarning,
            stacklevel=3,
        )
