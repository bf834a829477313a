"""Writers of step records: CSV, JSON lines, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from steadygrad.telemetry.history import TOTAL_NAMES, StepRecord


class _LineWriter:
    """Gathers lines and appends them to a file, which is open only while it is written to."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The path is made absolute, since a program may change its working directory.
        self.path = Path(path).absolute()
        self._lines: list[str] = []

    def flush(self) -> None:
        """Appends the gathered lines to the file; lines that could not be written are dropped."""
        lines, self._lines = self._lines, []
        if lines:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write((self._header() if file.tell() == 0 else "") + "".join(lines))

    def _header(self) -> str:
        """Returns the beginning of a new file."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class JSONLWriter(_LineWriter):
    """Appends a JSON object per step to a file.

    The keys are those of :meth:`StepRecord.totals`. At level ``"tensor"`` there are also ``tensor_norms``, an object
    with every norm by name, and ``tensor_nonfinite``, an object with the counts that are not 0. JSON has no non-finite
    numbers, so they are the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which ``float`` converts.

    Args:
        path: Path of the file; an existing file is appended to.
    """

    def __call__(self, record: StepRecord) -> None:
        """Takes the record of one step."""
        values: dict[str, Any] = {key: _finite(v) for key, v in record.totals().items()}
        if record.tensor_norms is not None and record.tensor_nonfinite is not None:
            norms, counts = record.tensor_norms.tolist(), record.tensor_nonfinite.tolist()
            values["tensor_norms"] = {
                name: _finite(norm) for name, norm in zip(record.names, norms, strict=True)
            }
            values["tensor_nonfinite"] = {
                name: count for name, count in zip(record.names, counts, strict=True) if count
            }
        self._lines.append(json.dumps(values, allow_nan=False) + "\n")


class CSVWriter(_LineWriter):
    """Appends a row per step to a file of comma-separated values.

    The columns are those of :meth:`StepRecord.totals`, with flags as 0 or 1. At level ``"tensor"`` they are followed by
    ``norm:<name>`` for each parameter and then ``nonfinite:<name>`` for each. A new file begins with a line of names.

    Args:
        path: Path of the file; an existing file is appended to if it has the same columns.

    Raises:
        ValueError: The file has other columns; raised when the writer is called.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._columns: list[str] | None = None

    def __call__(self, record: StepRecord) -> None:
        """Takes the record of one step."""
        norms = [] if record.tensor_norms is None else record.tensor_norms.tolist()
        counts = [] if record.tensor_nonfinite is None else record.tensor_nonfinite.tolist()
        names = [" ".join(name.splitlines()) for name in record.names] if norms else []
        columns = [
            *TOTAL_NAMES,
            *(f"norm:{name}" for name in names),
            *(f"nonfinite:{name}" for name in names),
        ]
        if columns != self._columns:
            self._begin(columns)
        totals = [int(v) if isinstance(v, bool) else v for v in record.totals().values()]
        self._lines.append(_csv_line([*totals, *norms, *counts]))

    def _begin(self, columns: list[str]) -> None:
        self.flush()
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open(encoding="utf-8", newline="") as file:
                found = next(csv.reader(file))
            if found != columns:
                raise ValueError(
                    f"CSVWriter: path: expected a new file or one with {len(columns)} columns, {columns[0]} to "
                    f"{columns[-1]}, got {self.path} with {len(found)} or others"
                )
        self._columns = columns

    def _header(self) -> str:
        return _csv_line(self._columns or [])


class TensorBoardWriter:
    """Writes scalars for TensorBoard.

    The tags are ``<prefix>/norm``, ``clipped_norm``, ``limit``, ``clipped``, ``skipped`` and ``nonfinite``, and at
    level ``"tensor"`` also ``<prefix>_tensors/<name>`` for each norm. Non-finite numbers are left out.

    Args:
        target: Folder of the event files, or a ``torch.utils.tensorboard.SummaryWriter``, which the caller closes.
        prefix: Prefix of the tags. Default: ``"steadygrad"``.

    Raises:
        ImportError: ``target`` is a folder and TensorBoard is not installed.
    """

    def __init__(self, target: str | os.PathLike[str] | Any, prefix: str = "steadygrad") -> None:
        self._target = target
        self._prefix = prefix
        self._writer: Any = target
        if isinstance(target, (str, os.PathLike)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoardWriter: tensorboard is not installed: pip install 'steadygrad[tensorboard]'"
                ) from error
            make: Any = SummaryWriter
            self._writer = make(os.fspath(target))

    def __call__(self, record: StepRecord) -> None:
        """Takes the record of one step."""
        keys = ("norm", "clipped_norm", "limit", "clipped", "skipped", "nonfinite")
        for key in keys:
            self._add(f"{self._prefix}/{key}", float(getattr(record, key)), record.step)
        if record.tensor_norms is None:
            return
        for name, norm in zip(record.names, record.tensor_norms.tolist(), strict=True):
            self._add(f"{self._prefix}_tensors/{name}", norm, record.step)

    def _add(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Writes the pending events to disk."""
        self._writer.flush()

    def __repr__(self) -> str:
        """Returns the class name and the target."""
        return f"TensorBoardWriter({self._target!r})"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _csv_line(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
