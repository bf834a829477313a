"""A deep convolutional network and a deep fully connected one on MNIST's images."""

from __future__ import annotations

from .. import remedies as r
from ..experiment import Experiment, Problem
from ..models import Mlp, PlainCnn
from .digits import five_thousand_digits

MNIST = Experiment(
    name="mnist",
    title="A 9-layer plain CNN and a 10-layer MLP on digits",
    about="Networks as one would build them, initialised by He's rule or by torch's, at learning "
    "rates up to one that is too large: what keeps them training, and what it costs.",
    problems=(
        Problem(
            name="CNN",
            title="9-layer plain CNN of 16 channels, He init, SGD with momentum .9",
            task=five_thousand_digits,
            model=PlainCnn(layers=9, channels=16),
            steps=250,
            batch_size=32,
            momentum=0.9,
        ),
        Problem(
            name="MLP",
            title="10-layer MLP of 128 units, He init, SGD with momentum .9",
            task=five_thousand_digits,
            model=Mlp(layers=10, width=128),
            steps=400,
            batch_size=32,
            momentum=0.9,
        ),
    ),
    arms=(
        r.NONE,
        r.CLIP,
        r.CLIP_TORCH,
        r.PERCENTILE,
        r.Z_SCORE,
        r.Z_SCORE_CAPPED,
        r.RELATIVE,
        r.RELATIVE_UNCAPPED,
        r.ADAPTIVE,
        r.L1,
        r.L2,
        r.WEIGHT_DECAY,
        r.ACTIVATION_L1,
        r.ACTIVATION_L2,
        r.BATCH_NORM,
        r.BATCH_NORM_TORCH,
        r.DROPOUT,
        r.TORCH_INIT,
        r.LEAKY,
        r.ELU,
        r.TANH,
        r.WARMUP,
        r.COSINE,
        r.STEP_DECAY,
        r.PLATEAU,
        r.ACCUMULATE,
        r.RAW,
        r.AUGMENT,
        r.EARLY,
        r.CLIP_NORM,
    ),
    learning_rates=(1e-2, 1e-1),
    twin_rates=(1e-2,),
)
