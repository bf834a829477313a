"""Norms, clips and steps over tensors that several processes share; the engine is ``torch.distributed``.

Parameters that are DTensors (``fully_shard``, tensor parallel) need nothing from here: every function and every step
takes them. :func:`reduce_norm`, and the option of that name, are for groups of ranks that the tensors do not know of.
"""

from __future__ import annotations

from steadygrad.distributed.norms import reduce_norm

__all__ = ["reduce_norm"]
