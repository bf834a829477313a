"""A character network on real text."""

from __future__ import annotations

import dataclasses

from .. import remedies as r
from ..experiment import Experiment, Problem
from ..models import Recurrent
from ..sequences import NextCharacter

# A hundredth of the one for digits: the learning rate is a hundred times as large.
WEIGHT_DECAY = dataclasses.replace(r.WEIGHT_DECAY, about="of SGD, 1e-4", weight_decay=1e-4)

CHAR = Experiment(
    name="char",
    title="The next character of the help texts of CPython",
    about="A tanh network that saturates: without a limit its loss jumps above that of guessing and "
    "never becomes NaN. A fixed limit has to be searched for; the adaptive policies are at their "
    "defaults.",
    problems=(
        Problem(
            name="char",
            title="96 tanh units on pieces of 64 characters, SGD",
            task=NextCharacter,
            # Recurrent weights at the edge: gradients neither grow nor shrink at the beginning.
            model=Recurrent(hidden=96, embedding=32, every_step=True, recurrent_gain=1.0),
            steps=400,
            batch_size=16,
        ),
    ),
    arms=(
        r.NONE,
        r.CLIP_5,
        r.CLIP,
        r.CLIP_TORCH,
        r.CLIP_QUARTER,
        r.DAMP,
        r.PERCENTILE,
        r.Z_SCORE,
        r.Z_SCORE_CAPPED,
        r.RELATIVE,
        r.RELATIVE_UNCAPPED,
        r.ADAPTIVE,
        r.CLIP_SKIP,
        r.SKIP,
        r.BACKOFF,
        WEIGHT_DECAY,
        r.WARMUP,
    ),
    learning_rates=(1.0, 4.0),
    twin_rates=(1.0,),
)
