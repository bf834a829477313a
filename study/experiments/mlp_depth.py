"""Fully connected networks of 5 to 50 layers."""

from __future__ import annotations

from .. import remedies as r
from ..experiment import Experiment, Problem
from ..models import Mlp
from .digits import five_thousand_digits


def _problem(layers: int) -> Problem:
    return Problem(
        name=f"{layers} layers",
        title=f"{layers}-layer ReLU MLP at 1.25 x He, SGD with momentum .9",
        task=five_thousand_digits,
        model=Mlp(layers=layers, width=64, init_gain=1.25),
        steps=400,
        batch_size=32,
        momentum=0.9,
    )


MLP_DEPTH = Experiment(
    name="mlp-depth",
    title="ReLU MLPs of 5 to 50 layers on digits, initialised at 1.25 x He",
    about="What is too large by a quarter per layer is 3 times too large over 5 layers and 70,000 "
    "times over 50: where each remedy gives up.",
    problems=tuple(map(_problem, (5, 10, 20, 30))),
    full_problems=(_problem(50),),
    arms=(
        r.NONE,
        r.CLIP,
        r.PERCENTILE,
        r.Z_SCORE,
        r.Z_SCORE_CAPPED,
        r.ADAPTIVE,
        r.L2,
        r.BATCH_NORM,
        r.HE,
        r.CLIP_HE,
        r.CLIP_NORM,
    ),
    learning_rates=(1e-2,),
)
