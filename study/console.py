"""Where commands print: rich's console, or plain text where rich is missing."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TextIO


class Console(Protocol):
    """The part of rich's console that every command needs."""

    def print(self, *objects: object) -> None:
        """Print the objects and end the line."""


class CannotPrint(Exception):
    """Raised where standard output takes nothing, as on a full disk; its text is the system's reason."""


class _Output:
    """A stream whose errors can be told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """The stream's, flushed."""
        try:
            count = self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise  # a reader such as head has seen enough, and rich ends quietly
        except OSError as error:
            raise CannotPrint(error.strerror) from error
        return count

    def flush(self) -> None:
        """Nothing: every write is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PlainConsole:
    """Prints `str` of everything, for machines without rich."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._file = _Output(sys.stderr if stderr else sys.stdout)

    def print(self, *objects: object) -> None:
        """Print the objects and end the line."""
        self._file.write(" ".join(map(str, objects)) + "\n")


def open_console(*, stderr: bool = False) -> Console:
    """The console of rich if rich is there, else a plain one."""
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return PlainConsole(stderr=stderr)
    # The file as rich would choose it, but for its errors.
    output: Any = _Output(sys.stderr if stderr else sys.stdout)
    return RichConsole(file=output, stderr=stderr)
