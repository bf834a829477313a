"""Summarizes a history in a few lines, and finds explosions in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steadygrad.telemetry.history import Floats, History

# A gradient has exploded if its norm is more than this many times its usual norm.
EXPLODED_TIMES = 10.0
# The first norms of a run say little about what is usual, so a gradient has to exceed them by more.
_EARLY_STEPS, _EARLY_TIMES = 5, 100.0
# A gradient that is not finite is traced back to an explosion at most this many steps before.
_LEADS_WITHIN = 10
_DECAY = 0.9
_ALL = "all gradients"
_SHOWN = 5
_QUANTILES = (0.5, 0.9, 0.99, 1.0)
# A clip that is active in this share of the steps, and divides the median norm by this factor, does more than cut
# outliers.
_CUT_STEPS, _CUT_TIMES = 0.9, 10.0


@dataclass(frozen=True)
class Explosion:
    """Describes a gradient that was not finite, or whose norm was far above its usual norm.

    Attributes:
        step: Number of the step.
        name: Name of the parameter; ``"all gradients"`` at level ``"global"``.
        norm: Norm of the gradient before the clip.
        typical: Geometric moving average of the parameter's norms before; NaN if there are none.
        nonfinite: Number of non-finite elements of the gradient.
    """

    step: int
    name: str
    norm: float
    typical: float
    nonfinite: int

    @property
    def times(self) -> float:
        """Returns the ratio of the norm to the usual one; infinite if the gradient was not finite."""
        return math.inf if self.nonfinite or math.isnan(self.norm) else self.norm / self.typical

    def __str__(self) -> str:
        """Returns the name and how far the gradient went."""
        if self.nonfinite:
            return f"{self.name} ({self.nonfinite} non-finite elements)"
        return f"{self.name} (norm {self.norm:.3g}, {self.times:.3g} times its usual {self.typical:.3g})"


class Report:
    """Summarizes the recorded steps: ``print(opt.report())``.

    A gradient has *exploded* if it has non-finite elements, or if its norm is more than ten times the geometric moving
    average (decay 0.9) of its own earlier norms and also more than that of the total norm, so that it alone would
    change the step. As long as there are fewer than five earlier norms, it has to be more than a hundred times their
    average. After that, a norm enters the average as at most ten times the average and at least a tenth of it. So a
    lasting rise becomes the usual norm, and a single step changes the average little.

    Attributes:
        history: The recorded steps.
        explosions: The explosions in the order of steps. In each step gradients that are not finite come first, then
            those furthest from their usual norm; gradients that are not finite are in the order in which their last
            finite norms exceeded the usual ones.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.explosions = explosions(history)

    @property
    def steps(self) -> int:
        """Returns the number of recorded steps."""
        return len(self.history)

    @property
    def skipped_steps(self) -> list[int]:
        """Returns the numbers of the skipped steps."""
        steps: list[int] = self.history.step[self.history.skipped].tolist()
        return steps

    @property
    def clip_rate(self) -> float:
        """Returns the share of the steps taken in which the clip was active; NaN if no step was taken."""
        taken = ~(self.history.skipped | self.history.refused)
        return float(self.history.clipped[taken].mean()) if taken.any() else math.nan

    @property
    def norm_quantiles(self) -> dict[float, float]:
        """Returns the 0.5, 0.9, 0.99 and 1 quantiles of the finite norms before the clip; NaN if there are none."""
        norms = self.history.norm[np.isfinite(self.history.norm)]
        values = np.quantile(norms, _QUANTILES) if len(norms) else [math.nan] * len(_QUANTILES)
        return dict(zip(_QUANTILES, (float(value) for value in values), strict=True))

    @property
    def conclusions(self) -> list[str]:
        """Returns what follows from the numbers, a sentence each, with the call that helps; empty if nothing does.

        If at least 90 % of the steps taken were clipped, and the median norm was at least ten times its limit, the clip
        treats a symptom. If a gradient was not finite, its step and parameter are named, and where it began if a
        gradient had exploded within the ten steps before.
        """
        history, found = self.history, []
        with np.errstate(invalid="ignore", divide="ignore"):
            times = (history.norm / history.limit)[history.clipped]
        times = times[np.isfinite(times)]
        if self.clip_rate >= _CUT_STEPS and len(times) and np.median(times) >= _CUT_TIMES:
            found.append(
                f"{'every step is' if self.clip_rate == 1 else 'nearly every step is'} cut, in the median to a "
                f"{np.median(times):,.0f}th: the clip holds the symptom and not the cause. "
                "sg.examine(model, loss_function, batches, optimizer=opt) says what that is"
            )
        broken = next((explosion for explosion in self.explosions if explosion.nonfinite), None)
        if broken is not None:
            began = next(e for e in self.explosions if e.step >= broken.step - _LEADS_WITHIN)
            what = f"{broken.name} was not finite at step {broken.step}"
            if began.step < broken.step:
                found.append(
                    f"the gradient of {began.name} exploded at step {began.step}, and that of {what}. Load the weights "
                    "from before that: sg.examine(model, loss_function, batches, optimizer=opt) says why they explode"
                )
            else:
                found.append(
                    f"the gradient of {what}. "
                    'sg.examine(model, loss_function, batches, at="first_nonfinite") says where that comes from'
                )
        return found

    def __str__(self) -> str:
        """Returns norms, clip rate, skipped steps and explosions, a line each, and the conclusions."""
        if not self.steps:
            return "no steps recorded yet"
        history = self.history
        q = self.norm_quantiles
        lines = [
            f"steps {history.step[0]} to {history.step[-1]}, {len(history.names)} parameters",
            f"norm      median {q[0.5]:.3g}, 90 % below {q[0.9]:.3g}, 99 % below {q[0.99]:.3g}, largest {q[1.0]:.3g}"
            + self._where_largest(q[1.0]),
            f"clipped   {self._clipped()}",
            f"skipped   {_listed(self.skipped_steps)}{self._why_skipped()}",
        ]
        lines += self._explosion_lines()
        return "\n".join([*lines, *(f"=> {conclusion}" for conclusion in self.conclusions)])

    def _where_largest(self, largest: float) -> str:
        where = np.flatnonzero(self.history.norm == largest)
        return f" at step {self.history.step[where[0]]}" if len(where) else ""

    def _clipped(self) -> str:
        rate, count = self.clip_rate, int(self.history.clipped.sum())
        limits = self.history.limit
        known = limits[~np.isnan(limits)]
        shown = ""
        if len(known) and np.isfinite(known[-1]):
            shown = f", limit {known[-1]:.3g}" + (" at the end" if known.min() != known[-1] else "")
        return f"{count} steps{'' if math.isnan(rate) else f' ({100 * rate:.3g} % of those taken)'}{shown}"

    def _why_skipped(self) -> str:
        spikes = int(self.history.spiked.sum())
        others = len(self.skipped_steps) - spikes
        reasons = [f"{others} not finite"] * bool(others) + [f"{spikes} spikes"] * bool(spikes)
        return f" ({', '.join(reasons)})" if reasons else ""

    def _explosion_lines(self) -> list[str]:
        by_step: dict[int, list[Explosion]] = {}
        for explosion in self.explosions:
            by_step.setdefault(explosion.step, []).append(explosion)
        lines = []
        # The report shows the first step, since it all began there, and those that went furthest.
        first, *others = by_step or [0]
        others.sort(key=lambda step: -by_step[step][0].times)
        for step in sorted([first, *others[: _SHOWN - 1]] if by_step else []):
            found = by_step[step]
            more = f", and {len(found) - 1} more parameters" if len(found) > 1 else ""
            lines.append(f"exploded  step {step}: {found[0]}{more}")
        if len(by_step) > _SHOWN:
            lines.append(f"          and {len(by_step) - _SHOWN} more steps")
        return lines or ["exploded  never"]

    def __repr__(self) -> str:
        """Returns the text of the report."""
        return str(self)


def _listed(steps: list[int]) -> str:
    if not steps:
        return "never"
    shown = ", ".join(str(step) for step in steps[:_SHOWN])
    return f"{len(steps)} steps: {shown}" + (", ..." if len(steps) > _SHOWN else "")


def usual_norms(norms: Floats) -> Floats:
    """Returns what each norm is compared with, shape (steps, parameters): NaN where no norm came before."""
    usual = np.full(norms.shape, np.nan)
    logarithm = np.zeros(norms.shape[1])
    far = math.log(EXPLODED_TIMES)
    for i, (row, known) in enumerate(zip(norms, _known_before(norms), strict=True)):
        usual[i, known > 0] = np.exp(logarithm[known > 0])
        enters = _is_known(row)
        fed = np.log(row, where=enters, out=logarithm.copy())
        fed = np.where(known < _EARLY_STEPS, fed, np.clip(fed, logarithm - far, logarithm + far))
        # The average is a plain mean until there are enough norms for a moving one.
        weight = np.maximum(1 - _DECAY, 1 / (known + 1))
        logarithm = np.where(enters, logarithm + weight * (fed - logarithm), logarithm)
    return usual


def _is_known(norms: Floats) -> npt.NDArray[np.bool_]:
    return np.isfinite(norms) & (norms > 0)


def _known_before(norms: Floats) -> npt.NDArray[np.int64]:
    known = _is_known(norms)
    return np.cumsum(known, axis=0) - known


def explosions(history: History) -> list[Explosion]:
    """Finds the explosions in a history, in the order that :class:`Report` describes."""
    norms, counts = history.tensor_norms, history.tensor_nonfinite
    names: tuple[str, ...] = history.names
    if norms is None or counts is None:
        norms, counts = history.norm[:, None], history.nonfinite[:, None]
        names = (_ALL,)
    usual = usual_norms(norms)
    times = np.where(_known_before(norms) < _EARLY_STEPS, _EARLY_TIMES, EXPLODED_TIMES)
    with np.errstate(invalid="ignore"):
        # A gradient also has to exceed the usual total norm: one that had vanished and comes back changes little.
        bar = np.maximum(times * usual, usual_norms(history.norm[:, None]))
        places = np.argwhere((counts > 0) | (norms > bar))
        growth = norms / usual
    # A norm that is not finite has no growth, so it gets the growth of the last finite norm.
    last = np.zeros(norms.shape[1])
    for row in growth:
        row[:] = last = np.where(np.isfinite(row), row, last)
    found = [
        (
            float(growth[i, p]),
            Explosion(
                int(history.step[i]),
                names[p],
                float(norms[i, p]),
                float(usual[i, p]),
                int(counts[i, p]),
            ),
        )
        for i, p in places.tolist()
    ]
    found.sort(key=lambda each: (each[1].step, -each[1].times, -each[0]))
    return [explosion for _, explosion in found]
