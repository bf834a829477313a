"""Recorded steps, as arrays and one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steadygrad import _kernels

# Columns of a row. The first ones describe the step as a whole.
_COLUMNS = _kernels.TELEMETRY_COLUMNS
NORM, CLIPPED_NORM, LIMIT = (_COLUMNS[name] for name in ("norm", "clipped_norm", "limit"))
FLAGS, NONFINITE = _COLUMNS["flags"], _COLUMNS["nonfinite"]
TOTALS = len(_COLUMNS)
TOTAL_NAMES = (
    "step",
    "norm",
    "clipped_norm",
    "limit",
    "clipped",
    "skipped",
    "spiked",
    "refused",
    "nonfinite",
)
_CLIPPED, _SKIPPED, _REFUSED, _SPIKED = (
    _kernels.TELEMETRY_FLAGS[name] for name in ("clipped", "skipped", "refused", "spiked")
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepRecord:
    """One recorded step, as writers get it.

    Attributes:
        step: Number of calls of ``step`` before this one, including skipped steps.
        norm: Norm of all gradients before the clip.
        clipped_norm: Norm of all gradients after the clip; NaN if the step was not taken, or ``ClipAdaptive`` clipped.
        limit: Limit of the total norm. It is infinite if there is no limit, and NaN if there is not exactly one:
            ``clip_scope`` other than ``"global"``, ``ClipAdaptive``, param groups with different limits, no gradient at
            all, or a policy in a step that was not taken.
        clipped: Whether the clip was active.
        skipped: Whether the step was skipped, because of non-finite elements or its norm.
        spiked: Whether the step was skipped because of its norm (``skip=SkipSpikes()``).
        refused: Whether the step was refused under ``nonfinite="raise"``.
        nonfinite: Number of non-finite gradient elements.
        names: Names of all parameters.
        tensor_norms: Norm of each parameter's gradient before the clip, shape (parameters,). It is NaN for a parameter
            without a gradient, and infinite or NaN for a gradient with such elements. None at level ``"global"``.
        tensor_nonfinite: Number of non-finite elements of each gradient, int64, shape (parameters,). None at level
            ``"global"``.
    """

    step: int
    norm: float
    clipped_norm: float
    limit: float
    clipped: bool
    skipped: bool
    spiked: bool
    refused: bool
    nonfinite: int
    names: tuple[str, ...]
    tensor_norms: Floats | None
    tensor_nonfinite: Ints | None

    def totals(self) -> dict[str, Any]:
        """Returns everything that concerns the step as a whole, by name."""
        return {key: getattr(self, key) for key in TOTAL_NAMES}


class History:
    """The last recorded steps as arrays, oldest first; iterating over it gives :class:`StepRecord` objects.

    Attributes:
        step: Number of each step, int64, shape (steps,).
        names: Names of the parameters.
    """

    def __init__(self, first: int, rows: Floats, names: tuple[str, ...]) -> None:
        self._rows = rows
        self.step: Ints = np.arange(first, first + len(rows), dtype=np.int64)
        self.names = names

    def __len__(self) -> int:
        """Returns the number of steps."""
        return len(self._rows)

    def __iter__(self) -> Iterator[StepRecord]:
        """Yields a record per step."""
        columns = [getattr(self, name).tolist() for name in TOTAL_NAMES]
        norms, counts = self.tensor_norms, self.tensor_nonfinite
        for i, totals in enumerate(zip(*columns, strict=True)):
            values: dict[str, Any] = dict(zip(TOTAL_NAMES, totals, strict=True))
            yield StepRecord(
                **values,
                names=self.names,
                tensor_norms=None if norms is None else norms[i],
                tensor_nonfinite=None if counts is None else counts[i],
            )

    def since(self, step: int) -> History:
        """Returns the steps from number ``step`` on."""
        skipped = min(max(step - int(self.step[0]), 0), len(self)) if len(self) else 0
        first = int(self.step[0]) + skipped if len(self) else step
        return History(first, self._rows[skipped:], self.names)

    @property
    def norm(self) -> Floats:
        """Returns the total norms before the clip, shape (steps,)."""
        return self._rows[:, NORM]

    @property
    def clipped_norm(self) -> Floats:
        """Returns the total norms after the clip, shape (steps,); NaN for steps that were not taken."""
        return self._rows[:, CLIPPED_NORM]

    @property
    def limit(self) -> Floats:
        """Returns the limits of the total norm, shape (steps,): infinity for no limit, NaN for several limits."""
        return self._rows[:, LIMIT]

    @property
    def nonfinite(self) -> Ints:
        """Returns the numbers of non-finite elements, shape (steps,)."""
        return self._rows[:, NONFINITE].astype(np.int64)

    @property
    def clipped(self) -> Bools:
        """Returns whether the clip was active, shape (steps,)."""
        return self._flag(_CLIPPED)

    @property
    def skipped(self) -> Bools:
        """Returns whether the step was skipped, shape (steps,)."""
        return self._flag(_SKIPPED)

    @property
    def spiked(self) -> Bools:
        """Returns whether the step was skipped because of its norm, shape (steps,)."""
        return self._flag(_SPIKED)

    @property
    def refused(self) -> Bools:
        """Returns whether the step was refused, shape (steps,)."""
        return self._flag(_REFUSED)

    @property
    def tensor_norms(self) -> Floats | None:
        """Returns the norm of each parameter's gradient, shape (steps, parameters); None at level ``"global"``."""
        return self._rows[:, TOTALS : TOTALS + self._parameters] if self._parameters else None

    @property
    def tensor_nonfinite(self) -> Ints | None:
        """Returns each gradient's non-finite elements, shape (steps, parameters); None at level ``"global"``."""
        if not self._parameters:
            return None
        return self._rows[:, TOTALS + self._parameters :].astype(np.int64)

    @property
    def _parameters(self) -> int:
        columns: int = self._rows.shape[1]
        return (columns - TOTALS) // 2

    def _flag(self, flag: int) -> Bools:
        is_set: Bools = (self._rows[:, FLAGS].astype(np.int64) & flag) != 0
        return is_set

    def __repr__(self) -> str:
        """Returns the numbers of steps and parameters."""
        return f"History({len(self)} steps, {len(self.names)} parameters)"
