"""NumPy float64 definitions of every operation in the package.

What the kernels compute is defined here, in the shortest readable form, and they are tested against
it. Nothing in this package imports torch.
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
