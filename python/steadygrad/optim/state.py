"""The state that is stepped with each parameter: its names, how it is made, and what a device decides about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.arguments import as_float
from steadygrad.distributed.dtensors import local_tensor
from steadygrad.memory import Outcome, allocator, is_asynchronous, is_number_on
from steadygrad.optim.options import HALF_DTYPES, ParamStorage, checked_number

Group = Mapping[str, Any]


@dataclass(frozen=True)
class UpdateRule:
    """Describes a fused update rule, and how torch's optimizer of that name keeps its options and state.

    Attributes:
        name: The rule's name in the kernels.
        optimizer: torch's class. Only this very class is fused, since a subclass may override anything.
        takes_sparse: Whether torch's class accepts sparse gradients.
        initial_value: A function of group and name that returns the value of a new tensor or number of the state.
    """

    name: str
    optimizer: type[torch.optim.Optimizer]
    takes_sparse: bool = False
    initial_value: Callable[[Group, str], float] = lambda group, name: 0.0

    @property
    def number_names(self) -> tuple[str, ...]:
        """Returns the names of the numbers in a state, the ``step`` counter first."""
        return tuple(_kernels.state_numbers(self.name))

    @property
    def has_step(self) -> bool:
        """Returns whether the state has a ``step`` counter."""
        return bool(self.number_names)

    def state_names(self, group: Group) -> tuple[str, ...]:
        """Returns the names of the state tensors in the kernels' order, for the options of a group."""
        return tuple(_kernels.state_names(self.name, group))

    def new_state(self, param: Tensor, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
        """Makes the state that torch's class creates before a parameter's first step, except for the dtype."""
        state: dict[str, Tensor] = {}
        for name in self.number_names:
            wide = torch.get_default_dtype() == torch.float64
            wide = wide and not (name == "step" and group.get("fused"))
            state[name] = torch.full(
                (),
                self.initial_value(group, name),
                dtype=torch.float64 if wide else torch.float32,
                # torch keeps numbers on the CPU unless fused=True; if steps are decided on a device, they are there.
                device=param.device if is_asynchronous(param.device) else "cpu",
            )
        for name in self.state_names(group):
            state[name] = torch.full_like(
                param,
                self.initial_value(group, name),
                dtype=dtype,
                memory_format=torch.preserve_format,
            ).detach()
        return state


State = dict[str, Any]


def slot_of(
    rule: UpdateRule,
    storage: ParamStorage,
    param: Tensor,
    group: Group,
    names: tuple[str, ...],
    state: State,
    *,
    has_grad: bool,
    on_device: bool,
) -> tuple[_kernels.Slot | None, dict[str, Tensor]]:
    """Returns a parameter's slot, and the entries to put into its state once the step has been taken.

    The slot is None if there is no state, or if there is no gradient, not even an accumulated one.

    Args:
        rule: The update rule.
        storage: How half-precision parameters are stored.
        param: The parameter.
        group: Its param group.
        names: Names of the state tensors that the group's options need.
        state: The parameter's state.
        has_grad: Whether there is a gradient.
        on_device: Whether the device decides if the step is taken.
    """
    extra = storage.extra_name(param)
    if not names and not rule.has_step and extra is None:
        return None, {}
    # SGD keeps the key with the value None until there is momentum.
    first = any(state.get(name) is None for name in names)
    # The state may come from an optimizer with another rounding; then only this entry is made.
    lacks_extra = extra is not None and not storage.is_extra(state.get(extra), param)
    if (first or lacks_extra) and not has_grad:
        return None, {}
    made: dict[str, Tensor] = {}
    widened: dict[str, Tensor] = {}
    if first:
        made = rule.new_state(param, group, storage.dtype_for(param))
    else:
        widened = _widened(state, names, storage.dtype_for(param))
    if extra is not None and lacks_extra:
        made[extra] = storage.new_extra(param)
    for name in () if first else rule.number_names:
        if on_device and state[name].device != param.device:
            # The numbers move to where the step is decided, as with fused=True and capturable=True.
            dtype = torch.float32 if name == "step" else None
            state[name] = state[name].to(param.device, dtype, non_blocking=True)
        elif state[name].dtype not in (torch.float32, torch.float64):
            # torch's loading rounds all numbers but the step counter to the parameter's dtype. That one is an integer
            # in some checkpoints.
            widened[name] = state[name].float()
    # `first` matters to SGD, whose momentum begins differently. For other rules it marks state to take back if skipped.
    first = first or (bool(made) and (rule.has_step or not names))
    made = {**made, **widened}
    whole = {**state, **made}
    numbers = [whole[name] for name in rule.number_names]
    kept = whole[extra] if extra is not None else None
    states = [whole[name] for name in names]
    return _kernels.Slot(states=states, numbers=numbers, extra=kept, first=first), made


def _widened(state: State, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the state tensors in half precision that have to be fp32, converted; the values stay the same."""
    return {
        name: state[name].float()
        for name in names
        if dtype == torch.float32 and state[name].dtype in HALF_DTYPES
    }


def is_state_creation(
    param_groups: list[dict[str, Any]],
    defaults: dict[str, Any],
    asynchronous_device: torch.device | None,
    told: bool,
) -> bool:
    """Returns whether a step without state has zero gradients and no learning rate, so that it only creates state.

    Args:
        param_groups: The param groups of the optimizer.
        defaults: The limits of a group that lacks them.
        asynchronous_device: The device that decides about steps, or None.
        told: Whether telemetry's writers get every step.
    """
    for group in param_groups:
        rate = group.get("lr", 1)
        if is_number_on(rate, asynchronous_device):
            return False
        if not isinstance(rate, (int, float, Tensor)) or float(rate) != 0:
            return False
    # Looking at gradients on a device waits for them. So they are looked at only if such a step would leave traces: by
    # a penalty, by a clip to nothing, or in writers. Without writers the step just takes a row of the ring.
    waits = asynchronous_device is not None
    leaves_traces = told or any(_leaves_traces({**defaults, **group}) for group in param_groups)
    if waits and not leaves_traces:
        return False
    grads = [
        local_tensor(param.grad)
        for group in param_groups
        for param in group["params"]
        if param.grad is not None
    ]
    return all(not grad.is_sparse and _has_memory(grad) and not bool(grad.any()) for grad in grads)


def _leaves_traces(group: dict[str, Any]) -> bool:
    limit = as_float(group["max_norm"])
    clips_to_nothing = isinstance(limit, (int, float)) and limit < 1e-6
    return bool(group["l1"] or group["l2"] or clips_to_nothing)


def _has_memory(tensor: Tensor) -> bool:
    """Returns whether torch may read the tensor: freed storage would crash it, while the step raises an error."""
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


States = dict[Tensor, dict[str, Any]]


def scaling(
    grad_scale: Any, found_inf: Any, divisor: float | Tensor, device: torch.device | None
) -> _kernels.Scaling:
    """Checks the scaler's numbers if the host has them; ``divisor`` is that of accumulated gradients."""
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
    """Returns the device that decides about steps, by the first gradient, or None for the host; others are checked."""
    first: Tensor | None = None
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None:
                return param.device if is_asynchronous(param.device) else None
            first = param if first is None else first
    return first.device if first is not None and is_asynchronous(first.device) else None


class DeviceSteps:
    """Holds what one optimizer's steps keep on the device between them.

    Attributes:
        device: The device of the parameters.
        taken: For each parameter, in order, whether its first step has been taken; a skipped step does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.taken = torch.ones(0, dtype=torch.int32, device=device)
        # State that was entered before it is known whether the step that made it was taken, by the parameter's place.
        self._unproven: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        # The same for state that existed in half precision, with the dtype that it had.
        self._widened: list[tuple[Tensor, str, Tensor, torch.dtype]] = []
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._counted = [0, 0]
        self._counting = False
        self._kept: list[tuple[_kernels.Plan, Tensor]] = []
        # The number of steps with stochastic rounding, on the device and in the param groups.
        self._rounded_steps: Tensor | None = None
        self._known_rounded_steps = 0

    def settle(self, params: list[Tensor], state: States) -> None:
        """Forgets state that was replaced, and takes unproven state back if parameters moved, before a new plan."""
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
        """Notes which parameters take their first step with a new plan, and keeps a plan that graphs use alive."""
        before = self.taken
        if replaced is not None and replaced.captured:
            self._kept.append((replaced, before))
        # The tensor is filled on the device, since copying the list would wait for it.
        self.taken = torch.ones(len(first), dtype=torch.int32, device=self.device)
        for begin, end in _runs([i for i, is_first in enumerate(first) if is_first]):
            self.taken[begin:end].zero_()
        for begin, end in _runs(sorted(self._unproven)):
            self.taken[begin:end].copy_(before[begin:end])

    def enter(
        self, index: int, param: Tensor, entered: dict[str, Tensor], before: dict[str, Any]
    ) -> None:
        """Remembers the state of a first step that may turn out to be skipped; ``before`` is what was there."""
        replaced = {name for name in entered if before.get(name) is not None}
        self._widened += [(param, name, entered[name], before[name].dtype) for name in replaced]
        made = {name: value for name, value in entered.items() if name not in replaced}
        if made:
            self._unproven[index] = param, made

    def take_back(self, state: States) -> None:
        """Removes state that no step has used, which waits for the device if there may be any."""
        for param, name, wide, dtype in self._widened:
            # A value that still fits the dtype that it had goes back without loss.
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
        """Returns the memory for one step; ``counts`` says whether the device counts the step."""
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
        """Returns skipped and clipped steps since the last call; waits for the device if it has counted steps."""
        if not self._counting:
            return [0, 0]
        # The counts are never reset, since a step may be counting at this moment, or a graph may later.
        counts: list[int] = self._counts.tolist()
        new = [now - before for now, before in zip(counts, self._counted, strict=True)]
        self._counted = counts
        return new

    def count_rounded_steps(self, known: int) -> None:
        """Counts rounded steps on the device, for replays of graphs; ``known`` is the param groups' number."""
        if self._rounded_steps is None:
            self._rounded_steps = torch.zeros(1, dtype=torch.int64, device=self.device)
        # A number that differs from the last one brought there means that a checkpoint was loaded.
        if known != self._known_rounded_steps:
            self._rounded_steps.fill_(known)
            self._known_rounded_steps = known

    def take_rounded_steps(self) -> int:
        """Returns the rounded steps that the param groups do not know yet; waits for the device if there may be any."""
        if self._rounded_steps is None:
            return 0
        before, self._known_rounded_steps = self._known_rounded_steps, int(self._rounded_steps)
        return self._known_rounded_steps - before


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Yields ascending indices as ranges [begin, end)."""
    begin = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[begin], indices[i - 1] + 1
            begin = i
