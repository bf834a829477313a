"""Find when a training run exploded, and in which parameter first.

A test for NaN alone misses the explosions of saturating networks: when one step throws a tanh
network far away, its outputs stay bounded and its gradient nearly vanishes. So the gradient norms
and the final loss are tested as well.

``Stabilizer.report()`` has another definition: it calls ten times the usual norm of a parameter an
explosion. The report sees norms alone, while training goes on, and points to steps that are worth a
look; many runs with such steps learn. The definition here judges a finished run, knows its losses
and its end, and its verdicts are counted, so it has to be stricter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# DEFINITION says what these are; shares of a loss are shares of its magnitude.
FACTOR = 100.0
_WINDOW = 100
_FLOOR = 0.01  # norms near a minimum are small and jump
_GROWTH = 1e4  # a norm that grows slowly carries its median along
_LOSS_RISE = 1.0
_END_RISE = 0.1  # a network that learnt nothing ends above the start as often as below it

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
    """Says where a run exploded."""

    step: int  # the first one is 1
    parameter: str | None  # its name, None if the parameters do not tell


def first_explosion(
    losses: Sequence[float],
    norms: Sequence[float],
    parameter_norms: NDArray[np.float64],
    names: Sequence[str],
    start_loss: float,
    final_loss: float,
) -> Explosion | None:
    """Return the first explosion of a run, None if there was none.

    Args:
        losses: Batch loss of each step.
        norms: Gradient norm of each step, before the clip.
        parameter_norms: Gradient norm of each parameter, ``(steps, parameters)``.
        names: Names of the parameters.
        start_loss: Loss before the first step.
        final_loss: Loss after the last step.
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
    """Return ``loss`` raised by a share of its magnitude; a user's own loss may be negative."""
    return loss + rise * abs(loss)


def _parameter(norms: NDArray[np.float64], names: Sequence[str]) -> str | None:
    """Return the parameter whose norm had grown most at the last step, None if none stands out."""
    if not norms.size:
        return None
    if not np.isfinite(norms[-1]).any() and len(norms) > 1:
        norms = norms[:-1]
    last, before = norms[-1], norms[:-1][-_WINDOW:]
    broken = np.flatnonzero(~np.isfinite(last))
    if 0 < len(broken) < len(last):
        return names[int(broken[-1])]  # backward reaches the last layer first
    if len(broken):
        return None
    typical = np.median(before, axis=0) if len(before) else np.ones_like(last)
    with np.errstate(over="ignore"):  # a norm whose median was 0 has grown without limit
        growth = last / np.maximum(typical, np.finfo(np.float64).tiny)
    return names[int(np.argmax(growth))]
