"""Builds records of studies as JSON values, with outcomes that a test chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# An outcome is "learned", "idle" (survived), "lost" (not finite), "flat" (finite, no lower loss),
# or "spiked" (exploded on the way and learned).
Outcome = str
ACCURACY = {
    "name": "test accuracy",
    "better": "higher",
    "guessing": 0.1,
    "learned": 0.3,
    "target": 0.8,
}
BITS = {
    "name": "bits per character",
    "better": "lower",
    "guessing": 4.3,
    "learned": 3.5,
    "target": 2.8,
}


def an_arm(name: str, remedy: str = "", **changes: Any) -> dict[str, Any]:
    arm = {"name": name, "remedy": remedy or name, "about": f"about {name}", "by": "steadygrad"}
    return {**arm, "twin": None, "limit": None, **changes}


def a_problem(name: str, metric: Mapping[str, Any] = ACCURACY) -> dict[str, Any]:
    return {
        "name": name,
        "title": f"title of {name}",
        "data": "5,000 digits",
        "model": "Mlp(layers=20)",
        "parameters": 260310,
        "steps": 40,
        "batch_size": 32,
        "optimizer": "SGD, momentum 0.9",
        "metric": dict(metric),
    }


def a_run(
    problem: str, arm: str, rate: float, seed: int, outcome: Outcome, metric: float
) -> dict[str, Any]:
    finite = outcome != "lost"
    good = outcome in ("learned", "spiked")
    steps = 40 if finite else 7
    last = 0.5 if good else 2.2 if outcome == "idle" else 3.0
    losses = [2.3 + (last - 2.3) * k / steps for k in range(1, steps + 1)]
    norms: list[Any] = [4.0 + 0.1 * seed] * steps
    if not finite:
        losses[-1], norms[-1] = math.inf, math.nan
    exploded = steps if outcome in ("lost", "flat", "spiked") else None
    return {
        "problem": problem,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "steps": steps,
        "start_loss": 2.3,
        "final_loss": last if finite else "nan",
        "peak_loss": 2.4 if finite else "inf",
        "metric": metric if finite else None,
        "survived": good or outcome == "idle",
        "learned": good,
        "nonfinite_step": None if finite else steps,
        "exploded_step": exploded,
        "exploded_parameter": "2.weight" if exploded else None,
        "max_grad_norm": 5.0 if finite else "inf",
        "median_grad_norm": 4.0,
        "clipped_steps": 0,
        "skipped_steps": 0,
        "steps_to_target": 20 if good else None,
        "seconds_per_step": 0.001 if arm == "none" else 0.002,
        "memory_bytes": 2**21,
        "first_losses": [],
        "curve": {
            "step": list(range(1, steps + 1)),
            "loss": [_stored(v) for v in losses],
            "grad_norm": [_stored(v) for v in norms],
        },
        "evaluations": {"step": [], "metric": []},
    }


def an_experiment(
    name: str,
    arms: Sequence[dict[str, Any]],
    outcomes: Callable[[str, str, float, int], tuple[Outcome, float] | None],
    *,
    problems: Sequence[dict[str, Any]] | None = None,
    rates: Sequence[float] = (0.01, 0.1),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
) -> dict[str, Any]:
    """Return the record of an experiment.

    Args:
        name: Name of the experiment.
        arms: Arms made by :func:`an_arm`, the baseline first.
        outcomes: Function of problem, arm, learning rate and seed that returns what the run did and its
            metric, or None if there was no run.
        problems: Problems made by :func:`a_problem`. Default: one called ``"p"``.
        rates: Learning rates of the runs.
        seeds: Seeds of the runs.
    """
    problems = problems or [a_problem("p")]
    runs = []
    for problem in problems:
        for arm in arms:
            for rate in rates:
                found = [(s, outcomes(problem["name"], arm["name"], rate, s)) for s in seeds]
                runs += [
                    a_run(problem["name"], arm["name"], rate, s, *made) for s, made in found if made
                ]
    return {
        "name": name,
        "title": f"title of {name}",
        "about": f"about {name}",
        "learning_rates": list(rates),
        "seeds": list(seeds),
        "problems": list(problems),
        "arms": list(arms),
        "runs": runs,
    }


def a_study(*experiments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "schema": 3,
        "status": "complete",
        "mode": "default",
        "started": "2026-01-02T03:04:05+00:00",
        "wall_s": 120.0,
        "sessions": 1,
        "command_line": ["/a/bin/python", "-m", "study"],
        "machine": {
            "system": "Linux-6",
            "processor": "Test CPU",
            "cores": 2,
            "jobs": 2,
            "threads": 1,
        },
        "versions": {"python": "3.12.3", "torch": "2.13.0"},
        "definitions": {"survived": "the final loss is finite and below the one at the start."},
        "experiments": list(experiments),
        **changes,
    }


def _stored(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
