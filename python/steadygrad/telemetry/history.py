"""The steps that were recorded, as arrays and one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steadygrad import _kernels

# Columns of a row: the first ones are about the step as a whole.
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
    """One step, as writers get it.

    Attributes:
        step: how many calls of ``step`` came before it, skipped ones included.
        norm: of all gradients, before the clip.
        clipped_norm: after the clip by the norm; NaN where the step was not taken, or ``ClipAdaptive`` has clipped.
        limit: of the total norm; infinite where there is none, NaN where it is not one number (``clip_scope`` other
            than ``"global"``, ``ClipAdaptive``, param groups with different limits, no gradient at all, a policy in a
            step that was not taken).
        clipped: whether the clip was active.
        skipped: whether the step was left out, for non-finite elements or its norm.
        spiked: whether that was for its norm (``skip=SkipSpikes()``).
        refused: whether it was refused under ``nonfinite="raise"``.
        nonfinite: non-finite gradient elements.
        names: of all parameters.
        tensor_norms: norm of each parameter's gradient, before the clip, (parameters,); NaN for one without a gradient,
            and infinite or NaN for one with such elements. None at level ``"global"``.
        tensor_nonfinite: each one's non-finite elements, (parameters,), int64. None at level ``"global"``.
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
        """All but what belongs to single parameters, by name."""
        return {key: getattr(self, key) for key in TOTAL_NAMES}


class History:
    """The last recorded steps as arrays, oldest first; iterating gives :class:`StepRecord` objects, which say more.

    Attributes:
        step: number of each step, (steps,), int64.
        names: of the parameters.
    """

    def __init__(self, first: int, rows: Floats, names: tuple[str, ...]) -> None:
        self._rows = rows
        self.step: Ints = np.arange(first, first + len(rows), dtype=np.int64)
        self.names = names

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._rows)

    def __iter__(self) -> Iterator[StepRecord]:
        """One record per step."""
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
        """The steps from this number on."""
        skipped = min(max(step - int(self.step[0]), 0), len(self)) if len(self) else 0
        first = int(self.step[0]) + skipped if len(self) else step
        return History(first, self._rows[skipped:], self.names)

    @property
    def norm(self) -> Floats:
        """Total norm before the clip, (steps,)."""
        return self._rows[:, NORM]

    @property
    def clipped_norm(self) -> Floats:
        """Total norm after the clip, (steps,); NaN where the step was not taken."""
        return self._rows[:, CLIPPED_NORM]

    @property
    def limit(self) -> Floats:
        """Limit of the total norm, (steps,); infinite: none, NaN: not one number."""
        return self._rows[:, LIMIT]

    @property
    def nonfinite(self) -> Ints:
        """Non-finite elements, (steps,)."""
        return self._rows[:, NONFINITE].astype(np.int64)

    @property
    def clipped(self) -> Bools:
        """Whether the clip was active, (steps,)."""
        return self._flag(_CLIPPED)

    @property
    def skipped(self) -> Bools:
        """Whether the step was skipped, (steps,)."""
        return self._flag(_SKIPPED)

    @property
    def spiked(self) -> Bools:
        """Whether it was skipped for its norm, (steps,)."""
        return self._flag(_SPIKED)

    @property
    def refused(self) -> Bools:
        """Whether it was refused, (steps,)."""
        return self._flag(_REFUSED)

    @property
    def tensor_norms(self) -> Floats | None:
        """Norm of each parameter's gradient, (steps, parameters); None at level ``"global"``."""
        return self._rows[:, TOTALS : TOTALS + self._parameters] if self._parameters else None

    @property
    def tensor_nonfinite(self) -> Ints | None:
        """Non-finite elements of each, (steps, parameters); None at level ``"global"``."""
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
        """How much there is."""
        return f"History({len(self)} steps, {len(self.names)} parameters)"
