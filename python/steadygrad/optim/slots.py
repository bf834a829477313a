"""The state that a plan steps with each parameter: found in the optimizer's, or made for its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.optim.param_storage import HALF_DTYPES, ParamStorage
from steadygrad.optim.rule import Group, UpdateRule

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
    """A parameter's slot, and what of it is to be entered into its state once the step has been taken.

    None without a gradient, also none that was accumulated, and without state. ``on_device``: whether the decision to
    step is taken there. ``names``: of the states that the group's options ask
    for.
    """
    extra = storage.extra_name(param)
    if not names and not rule.has_step and extra is None:
        return None, {}
    # SGD keeps the key with None as its value until there is momentum.
    first = any(state.get(name) is None for name in names)
    # A checkpoint from elsewhere has none; the rest of its state stays.
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
            # Where the decision to step is taken, as with fused=True and capturable=True.
            state[name] = state[name].to(param.device, torch.float32, non_blocking=True)
        elif state[name].dtype in HALF_DTYPES:  # loading a checkpoint, torch rounds all but the step counter
            widened[name] = state[name].float()
    # Only SGD's momentum begins otherwise than it goes on. Elsewhere the mark says what a skipped step takes back.
    first = first or (bool(made) and (rule.has_step or not names))
    made = {**made, **widened}
    whole = {**state, **made}
    numbers = [whole[name] for name in rule.number_names]
    kept = whole[extra] if extra is not None else None
    states = [whole[name] for name in names]
    return _kernels.Slot(states=states, numbers=numbers, extra=kept, first=first), made


def _widened(state: State, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """State that was made in half precision in the dtype asked for: the same values."""
    return {
        name: state[name].float()
        for name in names
        if dtype == torch.float32 and state[name].dtype in HALF_DTYPES
    }
