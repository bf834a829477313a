"""Clip policies: where a step's limit comes from, other than a constant."""

from __future__ import annotations

from steadygrad.policies.adaptive import ClipAdaptive
from steadygrad.policies.clip_policy import ClipPolicy
from steadygrad.policies.constant import ClipNorm, Damp
from steadygrad.policies.history import ClipPercentile, SkipSpikes
from steadygrad.policies.moving_average import ClipRelative, ClipZScore
from steadygrad.policies.policy import KernelPolicy

__all__ = [
    "ClipAdaptive",
    "ClipNorm",
    "ClipPercentile",
    "ClipPolicy",
    "ClipRelative",
    "ClipZScore",
    "Damp",
    "KernelPolicy",
    "SkipSpikes",
]
