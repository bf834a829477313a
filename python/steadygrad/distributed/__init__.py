"""Norms, clips and steps over tensors that several processes share, by ``torch.distributed``.

For parameters that are DTensors (``fully_shard``, tensor parallel) nothing has to be called: every function and every
step accepts them. :func:`reduce_norm`, and the option of that name, are for groups of ranks that hold different
parameters without DTensors.
"""

from __future__ import annotations

from steadygrad.distributed.norms import reduce_norm

__all__ = ["reduce_norm"]
