"""Builds a tiny experiment, and runs that were never made, for the tests of the study."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

from study import Classification, Curve, Dataset, Experiment, Mlp, Problem, Run
from study import remedies as r

SEEDS = (0, 1)


@lru_cache(maxsize=1)
def blobs() -> Dataset:
    """Return four clouds of points, whose 16 coordinates count as a square image."""
    generator = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(4, 16, generator=generator)
    labels = torch.arange(240).remainder(4)
    inputs = centres[labels] + torch.randn(240, 16, generator=generator)
    return Dataset("blobs", inputs[:200], labels[:200], inputs[200:], labels[200:], 4)


def tiny(**changes: object) -> Experiment:
    """Return an experiment with a small network, which explodes at 0.5 without a remedy."""
    experiment = Experiment(
        name="tiny",
        title="a tiny network",
        about="Made for tests.",
        problems=(
            Problem(
                "blobs",
                "6-layer MLP",
                task=lambda: Classification(blobs()),
                model=Mlp(layers=6, width=12, init_gain=3.0, batch_size=16),
                steps=12,
                batch_size=16,
                momentum=0.9,
            ),
        ),
        arms=(r.NONE, r.CLIP, r.CLIP_TORCH, r.L2, r.HE),
        learning_rates=(1e-3, 0.5),
        seeds=SEEDS,
    )
    return dataclasses.replace(experiment, **changes)  # type: ignore[arg-type]


EXPERIMENT = tiny()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Set one thread in every test of a module that imports this: small networks get no faster by two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_run(**changes: object) -> Run:
    """Return the record of a run in which nothing special happened, with ``changes``."""
    run = Run(
        problem="blobs",
        arm="none",
        learning_rate=0.01,
        seed=0,
        steps=3,
        start_loss=2.3,
        final_loss=0.5,
        peak_loss=2.4,
        metric=0.8,
        survived=True,
        learned=True,
        nonfinite_step=None,
        exploded_step=None,
        exploded_parameter=None,
        max_grad_norm=5.0,
        median_grad_norm=2.0,
        clipped_steps=0,
        skipped_steps=0,
        steps_to_target=2,
        seconds_per_step=0.001,
        memory_bytes=1000,
        first_losses=(2.4, 1.0, 0.5),
        curve=Curve(step=(1, 2, 3), loss=(2.4, 1.0, 0.5), grad_norm=(5.0, 2.0, 1.0)),
        evaluations={"step": [2, 3], "metric": [0.8, 0.8]},
    )
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


EXPLODED = a_run(
    seed=1,
    final_loss=math.nan,
    peak_loss=math.inf,
    metric=None,
    survived=False,
    learned=False,
    nonfinite_step=3,
    exploded_step=2,
    exploded_parameter="0.weight",
    max_grad_norm=math.inf,
    steps_to_target=None,
    curve=Curve(
        step=(1, 2, 3), loss=(2.4, math.inf, math.nan), grad_norm=(5.0, math.inf, math.nan)
    ),
)
