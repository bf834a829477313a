"""Keep finished runs on disk, one per line, so that a killed study can resume.

Each line begins with its checksum. It is written and synchronised when its run is finished, and
never changed. A line that a kill has cut short is dropped, and its run is made again. The first
line says which study it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import StudyError
from .experiment import RunKey
from .record import encode

NAME = "journal.jsonl"


class Journal:
    """Holds the finished runs of a study, and locks their file against other processes.

    Args:
        path: Path of the file, which is created if it does not exist.
        plan: Everything that decides the numbers; a study is resumed only if this is the same.
        started: Time at which this session began; the time of the first session is kept.
        restart: Whether to drop the runs that are there. Default: False.

    Raises:
        StudyError: The file is damaged, or belongs to another study or to one that is running.
        OSError: The file cannot be written.
    """

    def __init__(
        self, path: Path, plan: Mapping[str, Any], started: str, restart: bool = False
    ) -> None:
        self.path = path
        self.started = started  # start of the first session
        self.runs: dict[tuple[str, RunKey], dict[str, Any]] = {}  # as JSON values
        self.sessions: list[float] = []  # seconds from the start of each to its last finished run
        self._began = time.perf_counter()
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._go_on(encode(dict(plan)), restart)
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                running = f"{path}: a study is running in this folder; name another --out"
                raise StudyError(running) from error
            raise

    def _go_on(self, plan: dict[str, Any], restart: bool) -> None:
        self._file.seek(0)
        # Text after the last newline is a line that was cut short.
        lines = [] if restart else self._file.read().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            checksum, _, content = line.partition(b" ")
            if checksum != b"%08x" % zlib.crc32(content):
                raise StudyError(
                    f"{self.path} is not the journal of a study (line {number} is not what was "
                    "written); name another --out, or add --restart to replace it"
                )
            self._keep(json.loads(content), plan)
        self._file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._append({"plan": plan, "started": self.started})
        self._append({"session": self.started})
        self.sessions.append(0.0)

    def add(self, experiment: str, run: Mapping[str, Any]) -> None:
        """Write a finished run, encoded by :func:`encode`; it is on disk when this returns."""
        seconds = time.perf_counter() - self._began
        entry = {"experiment": experiment, "run": dict(run), "session_s": seconds}
        self._append(entry)
        self._keep(entry, {})

    def _keep(self, entry: dict[str, Any], plan: Mapping[str, Any]) -> None:
        if run := entry.get("run"):
            self.runs[entry["experiment"], RunKey(*(run[name] for name in RunKey._fields))] = run
            self.sessions[-1] = entry["session_s"]
        elif "session" in entry:
            self.sessions.append(0.0)
        elif names := [key for key in plan if entry["plan"].get(key) != plan[key]]:
            raise StudyError(
                f"{self.path} holds an unfinished study with other {' and '.join(names)}; go on with "
                "the command it was started with, name another --out, or add --restart to drop it"
            )
        else:
            self.started = entry["started"]

    def _append(self, entry: Mapping[str, Any]) -> None:
        content = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(content), content))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which unlocks it."""
        self._file.close()
