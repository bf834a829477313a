"""Finished runs on disk, one line each, so that a killed study goes on where it was.

A line is written and synchronised when its run is finished and never changed; it begins with its
checksum. A line that a kill cut in two is dropped and its run made again. The first line says which
study it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import time
import zlib
from typing import Any, BinaryIO

from .encoding import decode_run, encode
from .experiment import RunKey
from .training import Run

NAME = "journal.jsonl"


class JournalError(ValueError):
    """The folder holds the journal of another study; the message says what to do."""


class Journal:
    """The finished runs of a study.

    Args:
        path: the file; made by :meth:`open`.
        plan: what decides the numbers: a study goes on only where this is the same.

    Attributes:
        runs: the finished ones, by experiment and key.
        sessions: seconds from the start of each session to its last finished run.
        started: when the first session began.
    """

    def __init__(self, path: pathlib.Path, plan: dict[str, Any]) -> None:
        self.path = path
        self._plan = encode(plan)
        self._file: BinaryIO | None = None
        self.sessions: list[float] = []
        self._began = 0.0
        self.started: str | None = None
        self.runs: dict[tuple[str, RunKey], Run] = {}

    def open(self, started: str, restart: bool = False) -> None:
        """Read what is there, or begin; no other process may until this one has ended.

        Args:
            started: when this session began; the first one's is kept.
            restart: drops what is there.

        Raises:
            JournalError: what is there belongs to another study, or to one that is running.
            OSError: the file cannot be written.
        """
        self._file = self.path.open("a+b")
        try:
            self._begin(self._file, started, restart)
        except BaseException:
            self.close()
            raise

    def _begin(self, file: BinaryIO, started: str, restart: bool) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(
                f"{self.path}: a study is running in this folder; name another --out"
            ) from error
        if restart:
            file.truncate(0)
        file.seek(0)
        text = file.read()
        # Whole lines only: the last one may have been cut in two.
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if lines:
            self._read(lines)
        if len(whole) < len(text):
            file.truncate(len(whole))
        if not lines:
            self.started = started
            self._append({"plan": self._plan, "started": started})
        self._append({"session": started})
        self.sessions.append(0.0)
        self._began = time.perf_counter()

    def add(self, experiment: str, run: Run) -> None:
        """Write a finished run; it is on disk when this returns."""
        seconds = time.perf_counter() - self._began
        self._append({"experiment": experiment, "run": encode(run), "session_s": seconds})
        self.runs[experiment, run.key] = run
        self.sessions[-1] = seconds

    def close(self) -> None:
        """Let others have the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the file, once everything is written elsewhere."""
        self.path.unlink(missing_ok=True)

    def _read(self, lines: list[bytes]) -> None:
        try:
            first, *rest = [json.loads(_checked(line, i)) for i, line in enumerate(lines, 1)]
            plan, self.started = first["plan"], first["started"]
            for entry in rest:
                if "run" in entry:
                    run = decode_run(entry["run"])
                    self.runs[entry["experiment"], run.key] = run
                    self.sessions[-1] = entry["session_s"]
                else:
                    self.sessions.append(0.0)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise JournalError(
                f"{self.path} is not the journal of a study ({error}); name another --out, or add "
                "--restart to replace it"
            ) from error
        if plan != self._plan:
            names = [key for key in self._plan if plan.get(key) != self._plan[key]]
            raise JournalError(
                f"{self.path} holds an unfinished study with other {' and '.join(names)}; go on with "
                "the command it was started with, name another --out, or add --restart to drop it"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        content = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode()
        self._file.write(_checksum(content) + b" " + content + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _checksum(content: bytes) -> bytes:
    return b"%08x" % zlib.crc32(content)


def _checked(line: bytes, number: int) -> bytes:
    checksum, _, content = line.partition(b" ")
    if checksum != _checksum(content):
        raise ValueError(f"line {number} is not what was written")
    return content
