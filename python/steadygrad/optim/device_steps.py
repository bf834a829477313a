"""Steps whose outcome stays on the device: nothing here waits for it unless it is asked to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import Outcome, allocator, is_asynchronous, is_number_on
from steadygrad.optim.options import checked_number

State = dict[Tensor, dict[str, Any]]


def scaling(
    grad_scale: Any, found_inf: Any, divisor: float | Tensor, device: torch.device | None
) -> _kernels.Scaling:
    """The scaler's numbers, checked where the host has them; ``divisor`` is that of accumulated gradients."""
    if isinstance(divisor, Tensor):
        grad_scale, divisor = divisor if grad_scale is None else grad_scale * divisor, 1.0
    scale_there = is_number_on(grad_scale, device)
    found_there = is_number_on(found_inf, device)
    scale = 1.0 if grad_scale is None or scale_there else _checked_grad_scale(grad_scale)
    if scale_there:
        grad_scale = grad_scale.float() if divisor == 1 else grad_scale.float() * divisor
    return _kernels.Scaling(
        unscale=1.0 if scale_there else 1.0 / (scale * divisor),
        found_inf=found_inf is not None
        and not found_there
        and checked_number("step: found_inf", found_inf, finite=False) > 0,
        grad_scale_tensor=grad_scale if scale_there else None,
        found_inf_tensor=found_inf.float() if found_there else None,
    )


def _checked_grad_scale(grad_scale: Any) -> float:
    scale = checked_number("step: grad_scale", grad_scale)
    if scale == 0:
        raise ValueError("step: grad_scale: expected a finite number > 0, got 0")
    return scale


def decision_device(param_groups: list[dict[str, Any]]) -> torch.device | None:
    """Where the parameters are, if decisions are to stay there: by the first gradient, all others are checked."""
    first: Tensor | None = None
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None:
                return param.device if is_asynchronous(param.device) else None
            first = param if first is None else first
    return first.device if first is not None and is_asynchronous(first.device) else None


class DeviceSteps:
    """What one optimizer's steps keep on the device between them.

    Attributes:
        device: where its parameters are.
        taken: per parameter, in order, whether its first step has been taken. A skipped one has not been.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.taken = torch.ones(0, dtype=torch.int32, device=device)
        # State entered before it is known that the step that made it was taken, by the parameter's place.
        self._unproven: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        # The same of state that was there before, in half precision: with the dtype that it had.
        self._widened: list[tuple[Tensor, str, Tensor, torch.dtype]] = []
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._counted = [0, 0]
        self._counting = False
        self._kept: list[tuple[_kernels.Plan, Tensor]] = []
        # Steps taken with stochastic rounding: there, and as far as the param groups know.
        self._rounded_steps: Tensor | None = None
        self._known_rounded_steps = 0

    def settle(self, params: list[Tensor], state: State) -> None:
        """Before a new plan: state that was replaced is somebody else's, and flags go by the parameters' places."""
        self._unproven = {
            index: (param, entered)
            for index, (param, entered) in self._unproven.items()
            if all(state.get(param, {}).get(name) is entered[name] for name in entered)
        }
        moved = len(self.taken) != len(params) or any(
            params[index] is not param for index, (param, _) in self._unproven.items()
        )
        if moved:
            self.take_back(state)

    def prepare(self, first: list[bool], replaced: _kernels.Plan | None) -> None:
        """For a new plan: which parameters take their first step. Plans that graphs use are kept alive."""
        before = self.taken
        if replaced is not None and replaced.captured:
            self._kept.append((replaced, before))
        # Filled there: a copy of the list would wait for the device.
        self.taken = torch.ones(len(first), dtype=torch.int32, device=self.device)
        for begin, end in _runs([i for i, is_first in enumerate(first) if is_first]):
            self.taken[begin:end].zero_()
        for begin, end in _runs(sorted(self._unproven)):
            self.taken[begin:end].copy_(before[begin:end])

    def enter(
        self, index: int, param: Tensor, entered: dict[str, Tensor], before: dict[str, Any]
    ) -> None:
        """Remembers the state of a first step that may turn out not to have been taken; ``before``: what was there."""
        replaced = {name for name in entered if before.get(name) is not None}
        self._widened += [(param, name, entered[name], before[name].dtype) for name in replaced]
        made = {name: value for name, value in entered.items() if name not in replaced}
        if made:
            self._unproven[index] = param, made

    def take_back(self, state: State) -> None:
        """Removes state that no step has used; waits for the device if there may be any."""
        for param, name, wide, dtype in self._widened:
            # What still is a number of the dtype that it had loses nothing by going back.
            narrow = wide.to(dtype)
            if state.get(param, {}).get(name) is wide and torch.equal(narrow.float(), wide):
                state[param][name] = narrow
        self._widened = []
        if not self._unproven:
            return
        taken = self.taken.tolist()
        for index, (param, entered) in self._unproven.items():
            held = state.get(param, {})
            for name, value in entered.items():
                if not taken[index] and held.get(name) is value:
                    del held[name]
            if param in state and not held:
                del state[param]
        self._unproven = {}

    def memory(
        self, outcome: Outcome, counts: bool, nonfinite: Tensor | None
    ) -> _kernels.DeviceMemory:
        """For one step; ``counts``: whether the device is to count it."""
        self._counting = self._counting or counts
        return _kernels.DeviceMemory(
            outcome=outcome.record,
            taken=self.taken,
            counts=self._counts if counts else None,
            nonfinite=nonfinite,
            rounded_steps=self._rounded_steps,
            allocate=allocator(self.device),
        )

    def take_counts(self) -> list[int]:
        """Skipped and clipped steps since the last call; waits for the device once steps have been taken there."""
        if not self._counting:
            return [0, 0]
        # Never set back, since a step may be counting at this moment, or a graph later.
        counts: list[int] = self._counts.tolist()
        new = [now - before for now, before in zip(counts, self._counted, strict=True)]
        self._counted = counts
        return new

    def count_rounded_steps(self, known: int) -> None:
        """Counts them there from now on, since replays of a graph take steps too; ``known`` as the param groups say."""
        if self._rounded_steps is None:
            self._rounded_steps = torch.zeros(1, dtype=torch.int64, device=self.device)
        # Another number than the last one that was brought there: a checkpoint was loaded.
        if known != self._known_rounded_steps:
            self._rounded_steps.fill_(known)
            self._known_rounded_steps = known

    def take_rounded_steps(self) -> int:
        """Those that the param groups do not know of yet; waits for the device if there may be any."""
        if self._rounded_steps is None:
            return 0
        before, self._known_rounded_steps = self._known_rounded_steps, int(self._rounded_steps)
        return self._known_rounded_steps - before


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending indices as ranges [begin, end)."""
    begin = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[begin], indices[i - 1] + 1
            begin = i
