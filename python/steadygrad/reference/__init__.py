"""NumPy float64 definitions of every operation in the package.

They define what the kernels compute, in the shortest readable form, and the kernels are tested against them. Nothing in
this package imports torch.
"""

from __future__ import annotations

from . import accumulation, batch_norm, clip, norm, penalty, policies, rounding, rules, step

__all__ = [
    "accumulation",
    "batch_norm",
    "clip",
    "norm",
    "penalty",
    "policies",
    "rounding",
    "rules",
    "step",
]
