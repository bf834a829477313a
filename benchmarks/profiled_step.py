"""One clipped AdamW step on a large tensor, then batch norm with ReLU, alone and behind a sum.

They are marked for a profiler that starts when it is told:

ncu --profile-from-start off --kernel-name 'regex:norm_kernel|update_kernel|batch_norm' python FILE
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import steadygrad as sg
from benchmarks.batch_norm_candidates import Layer, ours

_ELEMENTS = 2**27
# Of ResNet-50 at batch 256: behind the first 3 x 3 convolutions, and at the end of their blocks.
_WIDTH = (256, 64, 56, 56)
_SUM = (256, 256, 56, 56)


def _step() -> Callable[[], object]:
    param = torch.nn.Parameter(torch.randn(_ELEMENTS, device="cuda"))
    param.grad = torch.randn(_ELEMENTS, device="cuda")
    optimizer = sg.Stabilizer(torch.optim.AdamW([param], lr=1e-4), max_norm=1.0)
    return optimizer.step


def _batch_norm(shape: tuple[int, ...], dtype: torch.dtype, add: bool) -> Callable[[], object]:
    layer = Layer(shape, dtype, channels_last=True, add=add, relu=True)
    return ours(layer, torch.device("cuda")).run


def main() -> int:
    calls = (
        _step(),
        _batch_norm(_WIDTH, torch.float16, add=False),
        _batch_norm(_SUM, torch.float16, add=True),
        _batch_norm(_SUM, torch.float32, add=True),
    )
    for _ in range(3):
        for call in calls:
            call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
