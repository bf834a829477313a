"""The temporal-order and the addition problem of Pascanu et al. 2013."""

from __future__ import annotations

from .. import remedies as r
from ..experiment import Experiment, Problem
from ..models import Recurrent
from ..sequences import Addition, TemporalOrder


def _problem(kind: type[TemporalOrder] | type[Addition], name: str, length: int) -> Problem:
    return Problem(
        name=f"{name} {length}",
        title=f"{name}, length {length}: 50 tanh units, SGD",
        task=lambda: kind(length),
        # Half as large again as the edge: gradients through time grow from the first step on.
        model=Recurrent(hidden=50, recurrent_gain=1.5),
        steps=2500,
        batch_size=20,
        evaluations=10,
        until_target=True,
    )


RNN = Experiment(
    name="rnn",
    title="The temporal-order and the addition problem of Pascanu et al. 2013",
    about="A run has learned when fewer than 1 % of 10,000 test sequences are wrong. Sequences are "
    "made as they are needed, so there is nothing to overfit.",
    problems=(
        _problem(TemporalOrder, "temporal order", 20),
        _problem(TemporalOrder, "temporal order", 30),
        _problem(Addition, "addition", 20),
    ),
    full_problems=(_problem(TemporalOrder, "temporal order", 50),),
    arms=(
        r.NONE,
        r.CLIP,
        r.PERCENTILE,
        r.Z_SCORE,
        r.Z_SCORE_CAPPED,
        r.RELATIVE,
        r.RELATIVE_UNCAPPED,
        r.ADAPTIVE,
    ),
    learning_rates=(1e-1,),
)
