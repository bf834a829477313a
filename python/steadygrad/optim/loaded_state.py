"""What is checked of a state dict before any of it is loaded."""

from __future__ import annotations

from typing import Any

from steadygrad.arguments import checked_count
from steadygrad.optim.options import COUNTERS, StabilizerOptions
from steadygrad.optim.param_storage import ROUNDED_STEPS
from steadygrad.optim.policy_state import PolicyStates
from steadygrad.telemetry.recorder import RECORDED_STEPS

# Beyond it numbers of steps are no floats.
_MOST_STEPS = 2**53


def check_loaded(state_dict: dict[str, Any], options: StabilizerOptions) -> None:
    """Refuses a state dict whose counters or policies' states no step could go on from.

    Args:
        state_dict: of an optimizer, stabilized or not; keys that it lacks are not missed.
        options: of the optimizer that is to load it.

    Raises:
        TypeError: a counter is no int.
        ValueError: a counter is negative or too large, or a policy's state malformed.
    """
    # Nothing is asked of a policy in Python; "{}" stands in for the state that it has.
    policies = PolicyStates(options.clip, options.skip, options.scope, options.per_tensor, "{}")
    for i, group in enumerate(state_dict.get("param_groups", ())):
        for key in (*COUNTERS, ROUNDED_STEPS, RECORDED_STEPS):
            where = f"load_state_dict: param_groups[{i}][{key!r}]"
            steps = checked_count(where, group.get(key, 0))
            if steps >= _MOST_STEPS:
                raise ValueError(f"{where}: expected less than {_MOST_STEPS}, got {steps}")
        policies.check_loaded(group)
