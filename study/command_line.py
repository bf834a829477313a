"""Share code between the command lines of the study and of the benchmarks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from steadygrad.doctor import drop_output


def guarded(program: str, run: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    The code is 130 after Ctrl-C, and 1, with a line on stderr, where output cannot be written.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)  # noqa: T201
        return 130
    except OSError as error:
        drop_output()
        where = error.filename or "standard output or a file"
        print(f"{program}: {where} cannot be written: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 1


def folder_problem(given: str, folder: Path) -> str:
    """Create the folder for results before any work is done; return what is wrong with it, or ""."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{given}: {error.strerror}; name another place"
    return "" if os.access(folder, os.W_OK) else f"{given}: cannot be written; name another place"


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Parse a number of seconds above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not found > 0.0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return found
