"""What the fused step must know of an optimizer; each rule fills it in, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadygrad.memory import is_asynchronous
from steadygrad.optim.options import checked_number

Group = Mapping[str, Any]


@dataclass(frozen=True)
class UpdateRule:
    """A fused update rule and how torch's optimizer of that name keeps its options and state.

    Attributes:
        name: the rule's name in the kernels.
        optimizer: torch's class. Subclasses may override anything, so only this very type is fused.
        has_step: whether the state has a ``step`` counter.
        numbers: the group's hyper-parameters by the kernels' names, checked; ``where`` starts the messages.
        state_names: the state tensors in the kernels' order, for the options of a group.
        takes_sparse: whether torch's class accepts sparse gradients.
        initial_value: what a new tensor or number of the state is filled with, by its name.
        numbers_of_state: the state's numbers beside ``step``, in the kernels' order.
    """

    name: str
    optimizer: type[torch.optim.Optimizer]
    has_step: bool
    numbers: Callable[[Group, str], dict[str, float]]
    state_names: Callable[[Group], tuple[str, ...]]
    takes_sparse: bool = False
    initial_value: Callable[[Group, str], float] = lambda group, name: 0.0
    numbers_of_state: tuple[str, ...] = ()

    @property
    def number_names(self) -> tuple[str, ...]:
        """The names of all numbers that a state has."""
        return ("step", *self.numbers_of_state) if self.has_step else ()

    def structure(self, param_groups: Sequence[Group]) -> tuple[object, ...]:
        """What of the groups' options decides which state there is and whether the kernels can step it."""
        return tuple(
            [
                (self.state_names(group), group.get("differentiable"), group.get("capturable"))
                for group in param_groups
            ]
        )

    def new_state(self, param: Tensor, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state torch's class creates before a parameter's first step, but for its dtype."""
        state: dict[str, Tensor] = {}
        if self.has_step:
            wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
            # On the CPU, as torch has it without fused=True; where steps are decided on the device, on the device.
            there = param.device if is_asynchronous(param.device) else torch.device("cpu")
            step_dtype = (
                torch.float64 if wide and not is_asynchronous(param.device) else torch.float32
            )
            state["step"] = torch.zeros((), dtype=step_dtype, device=there)
            for name in self.numbers_of_state:
                first = self.initial_value(group, name)
                state[name] = torch.full((), first, dtype=step_dtype, device=there)
        for name in self.state_names(group):
            state[name] = torch.full_like(
                param, self.initial_value(group, name), dtype=dtype, memory_format=torch.preserve_format
            ).detach()
        return state


def group_number(group: Group, where: str, key: str, **limits: Any) -> float:
    """One number of a param group, checked."""
    return checked_number(where + key, group[key], **limits)
