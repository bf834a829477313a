"""Clip policies: rules that compute the limit of each step, other than a constant ``max_norm``."""

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
