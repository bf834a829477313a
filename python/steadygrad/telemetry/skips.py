"""The warning about a training that stands still because step after step is skipped."""

from __future__ import annotations

import numpy as np

from steadygrad.telemetry.history import History


def skips_message(history: History, in_a_row: int) -> str:
    """Says why the last steps of a history were skipped, from the first of them that the history still holds.

    Args:
        history: A history with at least one skipped step.
        in_a_row: Number of steps skipped in a row, which may be more than the history holds.
    """
    last = np.flatnonzero(history.skipped)[-1]
    others = np.flatnonzero(~history.skipped[:last])
    first = int(others[-1]) + 1 if len(others) else 0
    return (
        f"step: {in_a_row} steps in a row were skipped: {_reason(history, first)}. Parameters stay as they are until "
        "a step is taken. print(optimizer.report()) says more. Telemetry(warn_after_skips=...) sets after how many "
        "skipped steps this warning comes, None for never; Telemetry(stop_after_skips=...) raises"
    )


def _reason(history: History, place: int) -> str:
    step, counts = history.step[place], history.tensor_nonfinite
    if history.spiked[place]:
        return f"their norms are spikes, {history.norm[place]:.3g} at step {step}"
    if not history.nonfinite[place]:
        return f"found_inf, which a GradScaler sets, said to skip the step, first at step {step}"
    if counts is None:
        return f"gradients are not finite, first at step {step}; telemetry='tensor' would say of which parameter"
    places = np.flatnonzero(counts[place])
    if not len(places):
        return f"gradients of other ranks are not finite, first at step {step}"
    name, count = history.names[places[0]], counts[place][places[0]]
    others = len(places) - 1
    more = (
        f", nor {'is' if others == 1 else 'are'} {others} other{'s' * (others > 1)}"
        if others
        else ""
    )
    return f"the gradient of {name!r} is not finite ({count} elements){more}, first at step {step}"
