"""Fused gradient clipping, penalties and optimizer steps that keep PyTorch training steady.

>>> import torch, steadygrad as sg
>>> opt = sg.Stabilizer(torch.optim.AdamW(model.parameters(), lr=3e-4), max_norm=1.0)
>>> loss.backward()
>>> opt.step()       # non-finite check, norm, clip, penalty and update in two passes over memory
>>> opt.grad_norm    # norm before clipping
"""

from __future__ import annotations

from steadygrad.prerequisites import do_without_extension as _do_without_extension
from steadygrad.prerequisites import extension_problem as _extension_problem
from steadygrad.prerequisites import find_problem as _find_problem
from steadygrad.prerequisites import runs_as_program as _runs_as_program

if _problem := _find_problem():
    if not _runs_as_program():
        raise ImportError(_problem, name=__name__)
    # The doctor runs even so, to print the problem.
    from steadygrad.doctor import main as _main

    raise SystemExit(_main())
if _problem := _extension_problem():
    _do_without_extension(_problem, warn=not _runs_as_program())

from steadygrad import _kernels, distributed, nn, optim, telemetry
from steadygrad.accumulation import accumulate
from steadygrad.amp import GradScaler
from steadygrad.clip import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from steadygrad.examination import Examination, examine
from steadygrad.lr_backoff import LRBackoff
from steadygrad.optim.errors import NonfiniteGradientError
from steadygrad.optim.groups import param_groups
from steadygrad.optim.stabilizer import Stabilizer
from steadygrad.penalty import add_penalty_, soft_threshold_
from steadygrad.policies import (
    ClipAdaptive,
    ClipNorm,
    ClipPercentile,
    ClipPolicy,
    ClipRelative,
    ClipZScore,
    Damp,
    SkipSpikes,
)
from steadygrad.telemetry import History, Report, StepRecord, Telemetry, TooManySkippedSteps

__version__: str = _kernels.VERSION

__all__ = [
    "ClipAdaptive",
    "ClipNorm",
    "ClipPercentile",
    "ClipPolicy",
    "ClipRelative",
    "ClipZScore",
    "Damp",
    "Examination",
    "GradScaler",
    "History",
    "LRBackoff",
    "NonfiniteGradientError",
    "Report",
    "SkipSpikes",
    "Stabilizer",
    "StepRecord",
    "Telemetry",
    "TooManySkippedSteps",
    "accumulate",
    "add_penalty_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "distributed",
    "examine",
    "get_total_norm",
    "nn",
    "optim",
    "param_groups",
    "soft_threshold_",
    "telemetry",
]
