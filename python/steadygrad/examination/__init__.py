"""Finds out why a network explodes, and which remedy will keep it stable: :func:`steadygrad.examine`."""

from __future__ import annotations

from steadygrad.examination.evidence import REMEDIES, THRESHOLDS
from steadygrad.examination.examination import Examination, ParameterGradient, Verdict
from steadygrad.examination.examine import examine
from steadygrad.examination.recording import Layer, Numbers, Units
from steadygrad.examination.trials import Trial

__all__ = ["REMEDIES", "THRESHOLDS", "Examination", "Layer", "Numbers", "ParameterGradient"]
__all__ += ["Trial", "Units", "Verdict", "examine"]
