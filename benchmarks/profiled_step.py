"""One clipped AdamW step on a large tensor, marked for a profiler that starts when it is told.

ncu --profile-from-start off --kernel-name 'regex:norm_kernel|update_kernel' python FILE
"""

from __future__ import annotations

import sys

import torch

import steadygrad as sg

_ELEMENTS = 2**27


def main() -> int:
    param = torch.nn.Parameter(torch.randn(_ELEMENTS, device="cuda"))
    param.grad = torch.randn(_ELEMENTS, device="cuda")
    optimizer = sg.Stabilizer(torch.optim.AdamW([param], lr=1e-4), max_norm=1.0)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
