"""What of each step is recorded, for how long, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from steadygrad.arguments import checked_count
from steadygrad.telemetry.history import StepRecord

Level = Literal["global", "tensor"]
Writer = Callable[[StepRecord], Any]

# A ring whose size nobody has asked for: at most so many steps, and so many bytes while that leaves enough steps to
# know what is usual.
_MOST_STEPS, _MOST_BYTES, _LEAST_STEPS = 1000, 4_000_000, 20
_INTERVAL = 50


@dataclass(frozen=True)
class Telemetry:
    """What a stabilized optimizer remembers of its steps: ``telemetry=Telemetry(...)``, or just its level.

    Without being asked every optimizer remembers what ``Telemetry()`` says. The numbers are by-products of the pass
    that takes the norm. They go to a ring buffer on the parameters' device, which nothing waits for. See
    ``opt.telemetry``, ``opt.report()`` and ``opt.plot()``.

    Args:
        level: ``"global"`` keeps the total norm before and after the clip, the limit and the outcome of each step,
            40 bytes; ``"tensor"`` also every parameter's norm and count of non-finite elements, 16 bytes each.
            Default: ``"tensor"``.
        history: how many steps are kept, at least 1. None: 1,000, or as many as 4 MB hold (at level ``"tensor"`` 1,000
            steps of up to 247 parameters, 124 of 2,000), but not fewer than 20 or ``every``. Default: None.
        writers: callables that are given each step's :class:`StepRecord`, such as :class:`CSVWriter`,
            :class:`JSONLWriter`, :class:`TensorBoardWriter` or a function. One that raises is warned about and not
            called again: telemetry does not end a training. Default: none.
        every: steps from one call of the writers to the next, which gets all since, at least 1 and at most ``history``;
            also from one look at the ring to the next where it is on a CUDA device. Default: 50, or as many steps as
            are kept if that is less.
        stop_after_skips: raise :class:`TooManySkippedSteps`, with the report, when so many steps in a row were skipped,
            at least 1. On a CUDA device it is noticed at the next look. None: never. Default: None.
        warn_after_skips: warn (``RuntimeWarning``) when so many steps in a row were skipped, at least 1: once for each
            time that it happens, and at level ``"tensor"`` with the name of the first parameter whose gradient was not
            finite. On a CUDA device it is noticed at the next look, for which nothing is waited; the warning itself
            waits. None: never. Default: 20.

    Copies and pickles of an optimizer have no writers: two would write to one file.

    Raises:
        TypeError: a number is no int, or a writer cannot be called.
        ValueError: a number is out of range, or the level unknown.
    """

    level: Level = "tensor"
    history: int | None = None
    writers: Sequence[Writer] = ()
    every: int | None = None
    stop_after_skips: int | None = None
    warn_after_skips: int | None = 20

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.level not in get_args(Level):
            raise ValueError(f"Telemetry: level: expected 'global' or 'tensor', got {self.level!r}")
        for name in ("history", "every", "stop_after_skips", "warn_after_skips"):
            count = getattr(self, name)
            if count is not None:
                object.__setattr__(self, name, checked_count(f"Telemetry: {name}", count, low=1))
        if self.every is not None and self.history is not None and self.every > self.history:
            raise ValueError(
                f"Telemetry: every: expected at most history, {self.history}, got {self.every}"
            )
        writers = self.writers if isinstance(self.writers, Sequence) else [self.writers]
        for writer in writers:
            if not callable(writer):
                raise TypeError(
                    f"Telemetry: writers: expected callables that take a StepRecord, got {writer!r}"
                )
        object.__setattr__(self, "writers", tuple(writers))

    def steps_kept(self, bytes_per_step: int) -> int:
        """How many steps the ring holds."""
        if self.history is not None:
            return self.history
        fit = min(_MOST_STEPS, _MOST_BYTES // bytes_per_step)
        return max(fit, _LEAST_STEPS, self.every or 0)

    def interval(self, steps_kept: int) -> int:
        """``every``, or its default."""
        return min(_INTERVAL, steps_kept) if self.every is None else self.every

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and deepcopy, without the writers."""
        numbers = (self.every, self.stop_after_skips, self.warn_after_skips)
        return Telemetry, (self.level, self.history, (), *numbers)


def telemetry_settings(value: object) -> Telemetry | None:
    """The option of an optimizer: None, a level, or a :class:`Telemetry`.

    Raises:
        TypeError: it is something else.
        ValueError: the level is unknown.
    """
    if value is None or isinstance(value, Telemetry):
        return value
    if isinstance(value, str):
        return Telemetry(level=value)  # type: ignore[arg-type]
    raise TypeError(
        f"Stabilizer: telemetry: expected None, 'global', 'tensor' or a Telemetry, got {value!r}"
    )
