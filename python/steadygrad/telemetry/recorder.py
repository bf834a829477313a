"""Records steps in a ring buffer and hands them to writers."""

from __future__ import annotations

import atexit
import warnings
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.arguments import checked_count
from steadygrad.memory import is_asynchronous, keep_for_graphs
from steadygrad.parameter_names import parameter_names
from steadygrad.telemetry.history import TOTALS, History
from steadygrad.telemetry.report import Report
from steadygrad.telemetry.settings import Telemetry, Writer
from steadygrad.telemetry.skips import skips_message

# A key of every param group of an optimizer with telemetry: the number of steps recorded so far.
RECORDED_STEPS = "recorded_steps"
_MOST_STEPS = 2**53  # larger step numbers are not exact as float64

Groups = list[dict[str, Any]]


class TooManySkippedSteps(RuntimeError):
    """Raised once ``Telemetry(stop_after_skips=...)`` steps in a row were skipped; none of them changed anything.

    Attributes:
        report: The report on the recorded steps, which the message shows, too.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(
            f"step: too many steps in a row were skipped; what was recorded:\n{report}"
        )
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to make the error again: from the report, which the message is made of."""
        return type(self), (self.report,)


class _Snapshot:
    """A copy of the ring's newest rows, which a CUDA device may still be sending to the host."""

    def __init__(self, first: int, recorded: Tensor, rows: Tensor, newest: int) -> None:
        self._first = first
        if newest < rows.shape[0]:
            places = recorded + torch.arange(-newest, 0, device=rows.device)
            rows = rows.index_select(0, places.remainder(rows.shape[0]))
            self._is_ordered = True
        else:
            self._is_ordered = False
        on_cuda = rows.device.type == "cuda"
        self._recorded, self._rows = (
            torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=on_cuda)
            for t in (recorded, rows)
        )
        self._recorded.copy_(recorded, non_blocking=True)
        self._rows.copy_(rows, non_blocking=True)
        self._event = torch.cuda.Event() if on_cuda else None
        if self._event is not None:
            self._event.record()

    def is_there(self) -> bool:
        return self._event is None or self._event.query()

    def history(self, names: tuple[str, ...]) -> History:
        """Waits for the copy and returns its steps as a history."""
        if self._event is not None:
            self._event.synchronize()
        if not self._is_ordered:
            return _history(self._first, self._recorded, self._rows, names)
        end = int(self._recorded)
        begin = max(self._first, end - len(self._rows))
        return History(begin, self._rows.numpy()[len(self._rows) - (end - begin) :], names)


def _history(first: int, recorded: Tensor, rows: Tensor, names: tuple[str, ...]) -> History:
    end, size = int(recorded), rows.shape[0]
    begin = max(first, end - size)
    return History(begin, rows.numpy()[np.arange(begin, end) % size], names)


# The recorder is an attribute of the optimizer, since a writer may refer to its optimizer. Pickles and copies of the
# optimizer leave it out.
_ATTRIBUTE = "_steadygrad_recorder"
_with_writers: WeakSet[Recorder] = WeakSet()


def recorder_of(optimizer: torch.optim.Optimizer, settings: Telemetry) -> Recorder:
    """Returns the recorder of the optimizer with these settings; makes a new one where there is none."""
    recorder = optimizer.__dict__.get(_ATTRIBUTE)
    if recorder is None or recorder.settings is not settings:
        if recorder is not None:
            recorder.close()
        recorder = optimizer.__dict__[_ATTRIBUTE] = Recorder(settings)
    return recorder


@atexit.register
def _close_all() -> None:
    for recorder in list(_with_writers):
        recorder.close()


class Recorder:
    """Records the steps of one optimizer; starts afresh when a state with another step number is loaded.

    Args:
        settings: What is recorded and which writers get it.
    """

    def __init__(self, settings: Telemetry) -> None:
        self.settings = settings
        self._per_tensor = settings.level == "tensor"
        self._rows: Tensor | None = None
        self._recorded: Tensor | None = None
        # What memory() returned last, and the number of parameters and the device that it was made for.
        self._memory: _kernels.Telemetry | None = None
        self._parameters = 0
        self._device: torch.device | None = None
        self._replaced: list[Tensor] = []  # a captured graph may still write to these
        self._first = 0  # the number of the oldest step that may be in the ring
        self._saved: Any = 0  # the number of steps that the param groups hold
        self._names: tuple[str, ...] = ()
        self._writers: list[Writer] = list(settings.writers)
        self._next = 0  # the first step that no writer has seen
        self._unseen = 0  # steps since the last look
        self._interval = 1  # steps from one look at the ring to the next
        self._skipped_in_a_row = 0
        self._has_warned = False  # whether these skipped steps were warned about
        self._taken = 0  # steps since the first in the ring
        # Copies that are on their way from a device, and the last ones that have arrived. The key says whether a copy
        # is for the writers (steps they have not seen) or for a reader (all steps).
        self._snapshots: dict[bool, _Snapshot] = {}
        self._arrived: dict[bool, History] = {}
        if self._writers:
            _with_writers.add(self)

    def __del__(self) -> None:
        self.close()

    @property
    def tells(self) -> bool:
        """Returns whether there are writers, which get every step."""
        return bool(self._writers)

    # -- for a step -----------------------------------------------------------------------------

    def memory(
        self, groups: Groups, parameters: int, device: torch.device | None
    ) -> _kernels.Telemetry:
        """Returns where to record a step of ``parameters`` parameters on ``device``; None stands for the CPU."""
        saved = groups[0].get(RECORDED_STEPS, 0) if groups else 0
        memory = self._memory
        parameters = parameters if self._per_tensor else 0
        if memory is None or parameters != self._parameters or device != self._device:
            rows, recorded = self._begin(groups, TOTALS + 2 * parameters, device, saved)
            history = rows.shape[0]
            self._memory = memory = _kernels.Telemetry(
                rows=rows, recorded=recorded, history=history, per_tensor=self._per_tensor
            )
            self._parameters, self._device = parameters, device
        elif saved != self._saved:
            assert self._recorded is not None
            self._begin_at(saved, self._recorded)
        return memory

    def _begin(
        self, groups: Groups, columns: int, device: torch.device | None, saved: Any
    ) -> tuple[Tensor, Tensor]:
        steps: Any = saved
        if self._rows is not None and self._recorded is not None:
            self.close()
            keep_for_graphs(self._replaced, self._rows, self._recorded)
            if saved == self._saved:
                steps = int(self._recorded)
        self._names = parameter_names(groups)
        kept = self.settings.steps_kept(8 * columns)
        self._interval = self.settings.interval(kept)
        # The memory is not initialized: a row is read only after it was written, and pages that no step has reached
        # take no memory. The device is explicit, as torch.set_default_device would choose another one.
        where = torch.device("cpu") if device is None else device
        self._rows = torch.empty(kept, columns, dtype=torch.float64, device=where)
        self._recorded = torch.zeros(1, dtype=torch.int64, device=where)
        self._begin_at(steps, self._recorded)
        self._saved = saved
        return self._rows, self._recorded

    def _begin_at(self, saved: Any, recorded: Tensor) -> None:
        steps = checked_count(f"step: param_groups[0][{RECORDED_STEPS!r}]", saved)
        if steps >= _MOST_STEPS:
            raise ValueError(
                f"step: param_groups[0][{RECORDED_STEPS!r}]: expected less than {_MOST_STEPS}, got {steps}"
            )
        self.close()
        recorded.fill_(steps)
        self._first = self._next = self._saved = steps
        self._snapshots, self._arrived = {}, {}
        self._skipped_in_a_row = self._taken = 0
        self._has_warned = False

    def after_step(self, groups: Groups, skipped: bool | None) -> None:
        """Hands steps to the writers when it is time to; ``skipped`` is None if only the device knows.

        Raises:
            TooManySkippedSteps: Too many steps in a row were skipped, by the settings.
        """
        self._unseen += 1
        self._taken += 1
        judges = skipped is True
        if skipped is not None:
            self._count_skip(skipped)
            if not (skipped or self._writers):
                return
        if self._unseen >= self._interval and not _is_capturing(self._rows):
            stop, warn = self.settings.stop_after_skips, self.settings.warn_after_skips
            counts = skipped is None and (stop is not None or warn is not None)
            if self._writers or counts:
                self.hand_over(groups, wait=False)
            judges = judges or skipped is None
        if judges and self._skipped_in_a_row:
            self._judge_skips(groups)

    def _count_skip(self, skipped: bool) -> None:
        if skipped:
            self._skipped_in_a_row += 1
        elif self._skipped_in_a_row:
            self._skipped_in_a_row = 0
            self._has_warned = False

    def _judge_skips(self, groups: Groups) -> None:
        stop, warn = self.settings.stop_after_skips, self.settings.warn_after_skips
        if stop is not None and self._skipped_in_a_row >= stop:
            self.hand_over(groups, wait=True)
            raise TooManySkippedSteps(Report(self.read(groups, wait=True)))
        if warn is not None and self._skipped_in_a_row >= warn and not self._has_warned:
            self._has_warned = True
            message = skips_message(self.read(groups, wait=True), self._skipped_in_a_row)
            # The stack level is that of the call of the optimizer's step.
            warnings.warn(message, RuntimeWarning, stacklevel=6)

    # -- reading --------------------------------------------------------------------------------

    def read(self, groups: Groups, wait: bool, unseen: bool = False) -> History:
        """Returns the steps in the ring; without waiting, a CUDA device's newest copy that has arrived.

        Args:
            groups: The param groups, for names; empty if they are not at hand.
            wait: Whether to wait for a device.
            unseen: Whether to return only steps that the writers have not seen.
        """
        rows, recorded = self._rows, self._recorded
        names = parameter_names(groups)
        # Parameters that were added since the last step have no columns yet, so the names stay those of the columns.
        if rows is None or rows.shape[1] in (TOTALS, TOTALS + 2 * len(names)):
            self._names = names or self._names
        first = self._next if unseen else self._first
        if rows is None or recorded is None:
            return History(first, np.zeros((0, TOTALS)), self._names)
        if not is_asynchronous(rows.device):
            return _history(first, recorded, rows, self._names)
        # A copy that is on its way may miss some of the newest steps, so the next copy takes in more than one interval.
        handed = self._next - self._first
        newest = max(self._taken - handed, 0) + self._interval if unseen else len(rows)
        if unseen and not self._writers:
            rows = rows[:, :TOTALS]  # skipped steps are counted by their outcomes
        look = self._snapshots.pop(unseen, None)
        if wait:
            return (
                _Snapshot(self._first, recorded, rows, len(rows)).history(self._names).since(first)
            )
        if look is not None and look.is_there():
            self._arrived[unseen] = look.history(self._names)
            look = None
        if look is None:
            look = _Snapshot(self._first, recorded, rows, newest)
        if look.is_there():
            self._arrived[unseen] = look.history(self._names)
        else:
            self._snapshots[unseen] = look
        nothing = History(first, np.zeros((0, rows.shape[1])), self._names)
        return self._arrived.get(unseen, nothing).since(first)

    def hand_over(self, groups: Groups, wait: bool) -> None:
        """Hands the writers all steps they have not seen; an exception of a writer becomes a warning."""
        self._unseen = 0
        new = self.read(groups, wait, unseen=True)
        if not len(new):
            return
        self._next = int(new.step[-1]) + 1
        if self._rows is not None and is_asynchronous(self._rows.device):
            for skipped in new.skipped.tolist():
                self._count_skip(skipped)
        failures: list[str] = []
        interruption: BaseException | None = None
        for writer in list(self._writers):
            try:
                _write(writer, new)
            except Exception as error:
                failures.append(f"{writer!r} failed: {type(error).__name__}: {error}")
                if writer in self._writers:
                    self._writers.remove(writer)
            except BaseException as error:  # Ctrl-C: first serve the other writers
                interruption = error
        if interruption is not None:
            raise interruption
        # The warnings come last, since a filter may turn them into errors.
        for failure in failures:
            warnings.warn(
                f"Telemetry: writers: at one of steps {new.step[0]} to {new.step[-1]} {failure}. It is not called "
                "again; training goes on",
                RuntimeWarning,
                stacklevel=2,
            )

    def rename(self, groups: Groups) -> None:
        """Takes up the new names after parameters were named."""
        self.read(groups, wait=False)

    def save(self, groups: Groups) -> None:
        """Writes the number of steps to the param groups, which waits for the device if there was a step."""
        if self._recorded is None or not groups:
            return
        if groups[0].get(RECORDED_STEPS, 0) != self._saved:  # loaded since the last step
            self._begin_at(groups[0].get(RECORDED_STEPS, 0), self._recorded)
            return
        self._saved = int(self._recorded)
        for group in groups:
            group[RECORDED_STEPS] = self._saved

    def close(self) -> None:
        """Hands the writers what is left, when the optimizer or the process ends and before recording starts afresh."""
        if self._writers:
            self.hand_over([], wait=True)
        self._unseen = 0


def _write(writer: Writer, new: History) -> None:
    for record in new:
        writer(record)
    flush = getattr(writer, "flush", None)
    if flush is not None:
        flush()


def _is_capturing(rows: Tensor | None) -> bool:
    on_cuda = rows is not None and rows.device.type == "cuda"
    return on_cuda and torch.cuda.is_current_stream_capturing()
