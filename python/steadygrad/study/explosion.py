"""When a training run exploded, and in which parameter first.

A NaN test alone misses what happens to saturating networks: a tanh network that was thrown far away
by one step has bounded outputs, and its gradient all but vanishes. So the gradient norm is looked
at, too, and where the run ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# How many times its recent median a gradient norm has to be to count as an explosion.
FACTOR = 100.0
_WINDOW = 100
_FEWEST = 5
# How many times the one at the start a loss has to be to count as one: in a step, and in the end,
# where a network that never learnt anything is a little above its start as often as below.
_LOSS_FACTOR = 2.0
_END_FACTOR = 1.1

DEFINITION = (
    "at some step the batch loss or the gradient norm was not finite, or the gradient norm was more "
    f"than {FACTOR:g} times its median over the last {_WINDOW} steps (at least {_FEWEST}), or the "
    f"batch loss was more than {_LOSS_FACTOR:g} times the loss at the start; or the run ended with a "
    f"loss more than {_END_FACTOR:g} times that at the start, and then its step is that of the "
    "largest norm. The parameter is the one whose gradient had grown most, relative to its own median until then; "
    "where all were not finite at once, a step earlier"
)


@dataclass(frozen=True)
class Explosion:
    """Where a run exploded.

    Attributes:
        step: the first step is 1.
        parameter: name of the parameter, None where nothing is known of the parameters.
    """

    step: int
    parameter: str | None


def first_explosion(
    losses: Sequence[float],
    norms: Sequence[float],
    parameter_norms: NDArray[np.float64],
    names: Sequence[str],
    start_loss: float,
    final_loss: float,
) -> Explosion | None:
    """Find the first explosion of a run, None where there was none.

    Args:
        losses: batch loss of each step.
        norms: gradient norm of each step, before the clip.
        parameter_norms: gradient norm of each parameter, ``(steps, parameters)``.
        names: of the parameters.
        start_loss: before the first step.
        final_loss: after the last step.
    """
    step = _first_step(np.asarray(losses), np.asarray(norms), start_loss)
    if step is None:
        if not final_loss > _END_FACTOR * start_loss:
            return None
        step = int(np.argmax(norms))
    return Explosion(step + 1, _parameter(parameter_norms[: step + 1], names))


def _first_step(
    losses: NDArray[np.float64], norms: NDArray[np.float64], start_loss: float
) -> int | None:
    found = ~np.isfinite(losses) | ~np.isfinite(norms)
    if math.isfinite(start_loss):
        found |= losses > _LOSS_FACTOR * start_loss
    with np.errstate(invalid="ignore"):
        for step in range(_FEWEST, len(norms)):
            if found[step]:
                break
            found[step] = norms[step] > FACTOR * np.median(norms[max(0, step - _WINDOW) : step])
    return int(np.argmax(found)) if found.any() else None


def _parameter(norms: NDArray[np.float64], names: Sequence[str]) -> str | None:
    """The parameter that had grown most at the last of the steps."""
    if not norms.size:
        return None
    if not np.isfinite(norms[-1]).any() and len(norms) > 1:
        norms = norms[:-1]
    last, before = norms[-1], norms[:-1][-_WINDOW:]
    broken = np.flatnonzero(~np.isfinite(last))
    if 0 < len(broken) < len(last):
        return names[int(broken[-1])]  # backward comes to the last layer first
    if len(broken):
        return None
    typical = np.median(before, axis=0) if len(before) else np.ones_like(last)
    with np.errstate(over="ignore"):  # one that was 0 until now has grown without limit
        growth = last / np.maximum(typical, np.finfo(np.float64).tiny)
    return names[int(np.argmax(growth))]
