"""Where commands print: rich's console, or plain text where rich is missing."""

from __future__ import annotations

import sys
from typing import Protocol


class Console(Protocol):
    """The part of rich's console that every command needs."""

    def print(self, *objects: object) -> None:
        """Print the objects and end the line."""


class PlainConsole:
    """Prints `str` of everything, for machines without rich."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._file = sys.stderr if stderr else sys.stdout

    def print(self, *objects: object) -> None:
        """Print the objects and end the line."""
        self._file.write(" ".join(map(str, objects)) + "\n")
        self._file.flush()


def open_console(*, stderr: bool = False) -> Console:
    """The console of rich if rich is there, else a plain one."""
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return PlainConsole(stderr=stderr)
    return RichConsole(stderr=stderr)
