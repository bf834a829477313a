"""What a training's history says, in a few lines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from steadygrad.telemetry.history import Floats, History

# An explosion is a norm of so many times what is usual for it.
EXPLODED_TIMES = 10.0
# Steps after which something is known to be usual.
_KNOWN_AFTER = 5
_DECAY = 0.9
_ALL = "all gradients"
_SHOWN = 5
_QUANTILES = (0.5, 0.9, 0.99, 1.0)
# A clip is no longer for outliers where it cuts this share of the steps, half of them to a tenth.
_CUT_STEPS, _CUT_TIMES = 0.9, 10.0


@dataclass(frozen=True)
class Explosion:
    """A gradient that was not finite, or whose norm was far from what it had been.

    Attributes:
        step: its number.
        name: of the parameter; ``"all gradients"`` at level ``"global"``.
        norm: of its gradient, before the clip.
        typical: what its norm had been, as a geometric moving average; NaN in the first steps.
        nonfinite: its non-finite elements.
    """

    step: int
    name: str
    norm: float
    typical: float
    nonfinite: int

    @property
    def times(self) -> float:
        """How many times as large as usual; infinite where it was not finite."""
        return math.inf if self.nonfinite or math.isnan(self.norm) else self.norm / self.typical

    def __str__(self) -> str:
        """Its name, and how far it went."""
        if self.nonfinite:
            return f"{self.name} ({self.nonfinite} non-finite elements)"
        return f"{self.name} (norm {self.norm:.3g}, {self.times:.3g} times its usual {self.typical:.3g})"


class Report:
    """What happened in the recorded steps; ``print(opt.report())``.

    A gradient has *exploded* where it has non-finite elements, or where its norm is more than ten times the geometric
    moving average (decay 0.9) of its own norms before, and more than that of the total norm: a step that it alone would
    change. Nothing is known before five norms. What enters an average is within ten times of it, so that a lasting rise
    becomes the usual and a single step changes it little.

    Attributes:
        history: the steps.
        explosions: in the order of steps, the furthest from the usual first.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.explosions = explosions(history)

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.history)

    @property
    def skipped_steps(self) -> list[int]:
        """Numbers of the steps that were skipped."""
        steps: list[int] = self.history.step[self.history.skipped].tolist()
        return steps

    @property
    def clip_rate(self) -> float:
        """Share of the steps taken in which the clip was active; NaN if none was taken."""
        taken = ~(self.history.skipped | self.history.refused)
        return float(self.history.clipped[taken].mean()) if taken.any() else math.nan

    @property
    def norm_quantiles(self) -> dict[float, float]:
        """Median, 0.9, 0.99 and largest of the finite total norms before the clip; NaN if there is none."""
        norms = self.history.norm[np.isfinite(self.history.norm)]
        values = np.quantile(norms, _QUANTILES) if len(norms) else [math.nan] * len(_QUANTILES)
        return dict(zip(_QUANTILES, (float(value) for value in values), strict=True))

    @property
    def conclusions(self) -> list[str]:
        """What follows from the numbers, a sentence each, with the line to call; empty where nothing stands out.

        Where at least 90 % of the steps taken were clipped, and the norm was ten times its limit in the median, the
        clip holds a symptom. Where a gradient was not finite, the step and the parameter are named.
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
            found.append(
                f"the gradient of {broken.name} was not finite at step {broken.step}. "
                'sg.examine(model, loss_function, batches, at="first_nonfinite") says where that comes from'
            )
        return found

    def __str__(self) -> str:
        """Norms, clip rate, skipped steps and explosions, a line each, and what follows from them."""
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
        # The first is where it began; of the others the furthest.
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
    """What each norm is compared with, (steps, parameters): NaN where too little is known."""
    usual = np.full(norms.shape, np.nan)
    logarithm = np.zeros(norms.shape[1])
    known = np.zeros(norms.shape[1], dtype=np.int64)
    for i, row in enumerate(norms):
        before = known >= _KNOWN_AFTER
        usual[i, before] = np.exp(logarithm[before])
        enters = np.isfinite(row) & (row > 0)
        fed = np.log(row, where=enters, out=logarithm.copy())
        far = math.log(EXPLODED_TIMES)
        fed = np.where(before, np.clip(fed, logarithm - far, logarithm + far), fed)
        # A mean of what there is, until there is enough for a moving one.
        weight = np.maximum(1 - _DECAY, 1 / (known + 1))
        logarithm = np.where(enters, logarithm + weight * (fed - logarithm), logarithm)
        known += enters
    return usual


def explosions(history: History) -> list[Explosion]:
    """Finds the explosions in a history, by step, the furthest from its usual norm first."""
    norms, counts = history.tensor_norms, history.tensor_nonfinite
    names: tuple[str, ...] = history.names
    if norms is None or counts is None:
        norms, counts = history.norm[:, None], history.nonfinite[:, None]
        names = (_ALL,)
    usual = usual_norms(norms)
    with np.errstate(invalid="ignore"):
        # A layer whose gradient had vanished and comes back changes the step by little.
        bar = np.maximum(EXPLODED_TIMES * usual, usual_norms(history.norm[:, None]))
        places = np.argwhere((counts > 0) | (norms > bar))
    found = [
        Explosion(
            int(history.step[i]),
            names[p],
            float(norms[i, p]),
            float(usual[i, p]),
            int(counts[i, p]),
        )
        for i, p in places.tolist()
    ]
    return sorted(found, key=lambda explosion: (explosion.step, -explosion.times))
