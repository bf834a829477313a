"""When a training run exploded, and in which parameter first.

A NaN test alone misses what happens to saturating networks: a tanh network that was thrown far away
by one step has bounded outputs, and its gradient all but vanishes. So the gradient norm is looked
at, too, and where the run ended.

This is not the definition of ``Stabilizer.report()``, which calls ten times the usual norm of a
parameter an explosion. That one sees norms alone, while training goes on, and points a person to a
step that is worth a look; many a run that has such steps learns. This one passes judgement on a
whole run, of which it also knows the losses and the end, and is counted: it has to be strict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# How many times its recent median a gradient norm has to be to count as an explosion. What is below
# a hundredth of the first step's norm is none: near a minimum norms are small and jump.
FACTOR = 100.0
_WINDOW = 100
_FLOOR = 0.01
# How many times that of the first step it has to be: what grows slowly carries its median along.
_GROWTH = 1e4
# By how many times its size a loss has to be above the one at the start to count as one: in a step,
# and in the end, where a network that never learnt anything is a little above it as often as below.
_LOSS_RISE = 1.0
_END_RISE = 0.1

DEFINITION = (
    "at some step the batch loss or the gradient norm was not finite; or the gradient norm was more "
    f"than {FACTOR:g} times its median over the last {_WINDOW} steps, and at least {_FLOOR:.0%} of "
    f"that of the first step; or it was more than {_GROWTH:,.0f} times that of the first step; or "
    f"the batch loss was more than {_LOSS_RISE:.0%} above the loss at the start; or the run ended with "
    f"a loss that was not finite, or more than {_END_RISE:.0%} above that at the start, and then the "
    "step is that of the largest norm. The parameter is the one whose gradient had grown most, "
    "relative to its own median until then; where all were not finite at once, a step earlier"
)


class Explosion(NamedTuple):
    """Where a run exploded."""

    step: int  # the first one is 1
    parameter: str | None  # its name, None where nothing is known of the parameters


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
        if math.isfinite(final_loss) and not final_loss > _above(start_loss, _END_RISE):
            return None
        step = int(np.argmax(norms))
    return Explosion(step + 1, _parameter(parameter_norms[: step + 1], names))


def _first_step(
    losses: NDArray[np.float64], norms: NDArray[np.float64], start_loss: float
) -> int | None:
    found = ~np.isfinite(losses) | ~np.isfinite(norms)
    if math.isfinite(start_loss):
        found |= losses > _above(start_loss, _LOSS_RISE)
    with np.errstate(invalid="ignore"):
        found |= (norms > _GROWTH * norms[0]) & (norms[0] > 0)
        for step in range(1, len(norms)):
            if found[step - 1]:
                break
            usual = FACTOR * np.median(norms[max(0, step - _WINDOW) : step])
            found[step] |= norms[step] > max(usual, _FLOOR * norms[0]) > 0
    return int(np.argmax(found)) if found.any() else None


def _above(loss: float, rise: float) -> float:
    """What is above a loss by a share of its size; a loss of one's own may be negative."""
    return loss + rise * abs(loss)


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
