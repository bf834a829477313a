"""Finds out why a network explodes, and which remedy will keep it stable: :func:`steadygrad.examine`."""

from __future__ import annotations

from steadygrad.examination.examination import Examination, ParameterGradient, Trial, Verdict
from steadygrad.examination.examine import examine
from steadygrad.examination.recording import Layer, Numbers, Units
from steadygrad.examination.verdicts import REMEDIES, THRESHOLDS

__all__ = ["REMEDIES", "THRESHOLDS", "Examination", "Layer", "Numbers", "ParameterGradient"]
__all__ += ["Trial", "Units", "Verdict", "examine"]
