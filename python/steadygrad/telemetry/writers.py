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
    """Gathers lines and appends them to a file, which is open for the time of that only."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # As it is now: programs change their folder.
        self.path = Path(path).absolute()
        self._lines: list[str] = []

    def flush(self) -> None:
        """Appends what was gathered; what could not be written is dropped."""
        lines, self._lines = self._lines, []
        if lines:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write((self._header() if file.tell() == 0 else "") + "".join(lines))

    def _header(self) -> str:
        """What a file begins with."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class JSONLWriter(_LineWriter):
    """Appends a JSON object per step to a file.

    Its keys are those of :meth:`StepRecord.totals`, and at level ``"tensor"`` ``tensor_norms``, an object of all norms
    by name, and ``tensor_nonfinite``, one of the counts that are not 0. JSON has no non-finite numbers: they are the
    strings ``"nan"``, ``"inf"`` and ``"-inf"``, which ``float`` takes.

    Args:
        path: of the file; one that is there is appended to.
    """

    def __call__(self, record: StepRecord) -> None:
        """Takes one step."""
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

    The columns are those of :meth:`StepRecord.totals`, flags as 0 or 1, and at level ``"tensor"`` for each parameter
    ``norm:<name>``, then for each ``nonfinite:<name>``. A new file begins with their names.

    Args:
        path: of the file; one that is there is appended to, if it has the same columns.

    Raises:
        ValueError: when called, if the file has other columns.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._columns: list[str] | None = None

    def __call__(self, record: StepRecord) -> None:
        """Takes one step."""
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

    ``<prefix>/norm``, ``clipped_norm``, ``limit``, ``clipped``, ``skipped`` and ``nonfinite``, and at level
    ``"tensor"`` ``<prefix>_tensors/<name>`` for each norm. Numbers that are not finite are left out.

    Args:
        target: folder of the event files, or a ``torch.utils.tensorboard.SummaryWriter`` that is yours to close.
        prefix: of the tags. Default: ``"steadygrad"``.

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
        """Takes one step."""
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
        """Has the events written."""
        self._writer.flush()

    def __repr__(self) -> str:
        """What it writes to."""
        return f"TensorBoardWriter({self._target!r})"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _csv_line(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
