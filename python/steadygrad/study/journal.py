"""Finished runs on disk, one line each, so that a killed study goes on where it was.

A line is written and synchronised when its run is finished and never changed. A line that a kill
cut in two is dropped and its run made again. The first line says which study it is.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Any

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
        self.sessions: list[float] = []
        self._began = 0.0
        self.started: str | None = None
        self.runs: dict[tuple[str, RunKey], Run] = {}

    def open(self, started: str) -> None:
        """Read what is there, or begin.

        Args:
            started: when this session began; the first one's is kept.

        Raises:
            JournalError: what is there belongs to another study.
            OSError: the file cannot be written.
        """
        text = self.path.read_bytes() if self.path.exists() else b""
        # Whole lines only: the last one may have been cut in two.
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if lines:
            self._read(lines)
        if len(whole) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
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

    def remove(self) -> None:
        """Remove the file, once everything is written elsewhere."""
        self.path.unlink(missing_ok=True)

    def _read(self, lines: list[bytes]) -> None:
        try:
            first, *rest = [json.loads(line) for line in lines]
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
        line = json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
