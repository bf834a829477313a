"""Run a clipped AdamW step on a large tensor of each dtype, then batch norms, under a profiler.

ncu --profile-from-start off python -m benchmarks.profiled_step
"""

from __future__ import annotations

import sys

import torch

from benchmarks.batch_norm import STEADYGRAD, Layer
from benchmarks.case import DTYPES
from benchmarks.cases import OPERATIONS
from benchmarks.shapes import one_tensor

# Shapes in ResNet-50 at batch 256: after the first 3 x 3 convolutions, and at the end of their
# blocks.
_WIDTH, _SUM = (256, 64, 56, 56), (256, 256, 56, 56)


def main() -> int:
    device, adamw = torch.device("cuda"), OPERATIONS["adamw"]
    steps = [adamw.builds[0](adamw.workload(one_tensor(27), dtype, device)) for dtype in DTYPES]
    layers = (
        Layer(_WIDTH, torch.float16, channels_last=True, relu=True),
        Layer(_SUM, torch.float16, channels_last=True, add=True, relu=True),
        Layer(_SUM, torch.float32, channels_last=True, add=True, relu=True),
    )
    calls = [candidate.run for candidate in steps]
    calls += [STEADYGRAD.build(layer, device).run for layer in layers]
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
