"""The mask of ReLU or ReLU6 after a residual, which the backward pass needs: one bit per element.

Only its size is known here. The kernels write every byte of a mask and read it again, and they alone know which bit
belongs to which element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import allocator


def mask_size(input: Tensor) -> int:
    """Returns the number of bytes of the mask of a dense input."""
    batch, channels = input.shape[:2]
    spatial = math.prod(input.shape[2:])
    rows, length = batch * channels, spatial
    if spatial == 1 or not input.is_contiguous():
        rows, length = batch * spatial, channels
    return rows * ((length + 7) // 8)


def new_mask(input: Tensor) -> Tensor:
    """Allocates memory for a mask."""
    return torch.empty(mask_size(input), dtype=torch.uint8, device=input.device)


def unpacked(mask: Tensor, input: Tensor) -> Tensor:
    """Converts a mask to a tensor of bools of the input's shape, True where ReLU lets the gradient through."""
    passed = torch.empty_like(input)
    zeros = torch.zeros(input.shape[1], dtype=input.dtype, device=input.device)
    # The gradient of a residual depends on nothing but the mask, so the other arguments may be anything.
    _kernels.batch_norm_backward(
        torch.ones_like(input),
        input,
        mask,
        None,
        None,
        None,
        zeros,
        zeros,
        1.0,
        math.inf,  # any ceiling, since the mask says what it cut off
        None,
        passed,
        None,
        None,
        allocator(input.device),
    )
    return passed != 0
