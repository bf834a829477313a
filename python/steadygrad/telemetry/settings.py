"""Settings of telemetry: what is recorded of each step, how many steps are kept, and which writers get them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from steadygrad.arguments import checked_count
from steadygrad.telemetry.history import StepRecord

Level = Literal["global", "tensor"]
Writer = Callable[[StepRecord], Any]

# A ring of the default size has at most so many steps. It also has at most so many bytes, but never fewer steps than
# it takes to know a usual norm.
_MOST_STEPS, _MOST_BYTES, _LEAST_STEPS = 1000, 4_000_000, 20
_INTERVAL = 50


@dataclass(frozen=True)
class Telemetry:
    """Sets what a stabilized optimizer records of its steps: ``telemetry=Telemetry(...)``, or just a level.

    By default every optimizer records what ``Telemetry()`` says. The numbers are by-products of the pass that computes
    the norm. They go to a ring buffer on the parameters' device, and nothing waits for them. Read them with
    ``opt.telemetry``, ``opt.report()`` and ``opt.plot()``.

    Args:
        level: ``"global"`` records the total norm before and after the clip, the limit and the outcome of each step, in
            40 bytes; ``"tensor"`` also the norm and the number of non-finite elements of every parameter, in 16 bytes
            each. Default: ``"tensor"``.
        history: Number of steps kept, at least 1. None keeps 1,000, or as many as fit into 4 MB (at level ``"tensor"``
            1,000 steps of up to 247 parameters, 124 steps of 2,000), but not fewer than 20 or ``every``. Default: None.
        writers: Callables that get each step's :class:`StepRecord`, such as :class:`CSVWriter`, :class:`JSONLWriter`,
            :class:`TensorBoardWriter` or a function. If one raises, there is a warning and it is not called again:
            telemetry does not end a training. Default: none.
        every: Number of steps from one call of the writers to the next, which gets all steps since, at least 1 and at
            most ``history``. Where the ring is on a CUDA device, it is also copied only that often. Default: 50, or the
            number of steps kept if that is less.
        stop_after_skips: Number of skipped steps in a row after which :class:`TooManySkippedSteps` is raised, with the
            report, at least 1. On a CUDA device they are noticed at the next copy. None: never. Default: None.
        warn_after_skips: Number of skipped steps in a row after which there is a ``RuntimeWarning``, at least 1. There
            is one for each such series; at level ``"tensor"`` it names the first parameter whose gradient was not
            finite. On a CUDA device they are noticed at the next copy, without waiting, but the warning itself waits.
            None: never. Default: 20.

    Copies and pickles of an optimizer have no writers, since two of them would write to one file.

    Raises:
        TypeError: A number is not an int, or a writer is not callable.
        ValueError: A number is out of range, or the level is unknown.
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
        """Returns the number of steps that the ring holds."""
        if self.history is not None:
            return self.history
        fit = min(_MOST_STEPS, _MOST_BYTES // bytes_per_step)
        return max(fit, _LEAST_STEPS, self.every or 0)

    def interval(self, steps_kept: int) -> int:
        """Returns ``every``, or its default."""
        return min(_INTERVAL, steps_kept) if self.every is None else self.every

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how pickle and deepcopy make the settings again, without the writers."""
        numbers = (self.every, self.stop_after_skips, self.warn_after_skips)
        return Telemetry, (self.level, self.history, (), *numbers)


def telemetry_settings(value: object) -> Telemetry | None:
    """Returns the settings for the ``telemetry`` option of an optimizer: None, a level, or a :class:`Telemetry`.

    Raises:
        TypeError: The option is something else.
        ValueError: The level is unknown.
    """
    if value is None or isinstance(value, Telemetry):
        return value
    if isinstance(value, str):
        return Telemetry(level=value)  # type: ignore[arg-type]
    raise TypeError(
        f"Stabilizer: telemetry: expected None, 'global', 'tensor' or a Telemetry, got {value!r}"
    )
