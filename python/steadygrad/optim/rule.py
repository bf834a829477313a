"""What the fused step must know of an optimizer; each rule fills it in, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import is_asynchronous

Group = Mapping[str, Any]


@dataclass(frozen=True)
class UpdateRule:
    """A fused update rule and how torch's optimizer of that name keeps its options and state.

    Attributes:
        name: the rule's name in the kernels.
        optimizer: torch's class. Subclasses may override anything, so only this very type is fused.
        takes_sparse: whether torch's class accepts sparse gradients.
        initial_value: what a new tensor or number of the state is filled with, by its name.
    """

    name: str
    optimizer: type[torch.optim.Optimizer]
    takes_sparse: bool = False
    initial_value: Callable[[Group, str], float] = lambda group, name: 0.0

    @property
    def number_names(self) -> tuple[str, ...]:
        """The names of the numbers in a state, the ``step`` counter first."""
        return tuple(_kernels.state_numbers(self.name))

    @property
    def has_step(self) -> bool:
        """Whether the state has a ``step`` counter."""
        return bool(self.number_names)

    def state_names(self, group: Group) -> tuple[str, ...]:
        """The state tensors in the kernels' order, for the options of a group."""
        return tuple(_kernels.state_names(self.name, group))

    def new_state(self, param: Tensor, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state torch's class creates before a parameter's first step, but for its dtype."""
        state: dict[str, Tensor] = {}
        numbers = self.number_names
        if numbers:
            wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
            # On the CPU, as torch has it without fused=True; where steps are decided on the device, on the device.
            there = param.device if is_asynchronous(param.device) else torch.device("cpu")
            step_dtype = (
                torch.float64 if wide and not is_asynchronous(param.device) else torch.float32
            )
            for name in numbers:
                first = self.initial_value(group, name)
                state[name] = torch.full((), first, dtype=step_dtype, device=there)
        for name in self.state_names(group):
            state[name] = torch.full_like(
                param, self.initial_value(group, name), dtype=dtype, memory_format=torch.preserve_format
            ).detach()
        return state
