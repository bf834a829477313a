"""Every operation once on small tensors of odd sizes: short enough to run under a sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitized_steps

torch has to allocate every tensor by itself for that: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

import steadygrad as sg
from benchmarks import sanitized_batch_norm
from steadygrad.self_check import TOLERANCES, check_kernels

# More than one launch has room for in its parameters.
_MANY = 4200


def _random(device: str, *shape: int) -> torch.nn.Parameter:
    # Drawn on the host: torch's own kernels are not what is being looked at.
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))
    param.grad = torch.randn(shape, generator=generator).to(device)
    return param


def _many_tensors(device: str) -> None:
    flat = torch.linspace(-1.0, 1.0, 3 * _MANY).to(device)
    norm = sg.get_total_norm(flat.split(3))
    torch.testing.assert_close(norm.cpu(), flat.cpu().norm())


def _strided(device: str) -> None:
    param = _random(device, 3, 5, 7, 9)
    grad = param.grad
    assert grad is not None
    param.grad = grad.to(memory_format=torch.channels_last)
    tail = torch.nn.Parameter(torch.ones(37, device=device)[3:])
    tail.grad = torch.ones(71, device=device)[1::2][:34]
    before = tail.detach().cpu().clone()
    sg.Stabilizer(torch.optim.AdamW([param, tail], lr=0.1), max_norm=1.0, l1=0.1).step()
    assert not torch.equal(tail.detach().cpu(), before)


def _skipped(device: str) -> None:
    param = _random(device, 4099)
    assert param.grad is not None
    param.grad[4098] = float("nan")
    before = param.detach().cpu().clone()
    optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=0.1, momentum=0.9), max_norm=1.0)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert torch.equal(param.detach().cpu(), before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="where the tensors live (default: cuda)")
    parser.add_argument("--dtypes", nargs="+", default=tuple(TOLERANCES["norm"]), metavar="DTYPE")
    parser.add_argument("--emulate", action="store_true", help="run emulated kernels on the CPU")
    options = parser.parse_args(argv)
    if options.emulate:
        from benchmarks.rehearsal import emulate

        emulate()
        options.device = "cpu"
    checks = check_kernels(sg, options.device, options.dtypes)
    wrong = [
        f"{check.operation}, {check.dtype}: {check.message or check.error}"
        for check in checks
        if not check.passed
    ]
    extras: list[tuple[str, Callable[[], None]]] = [
        (extra.__name__, partial(extra, options.device))
        for extra in (_many_tensors, _strided, _skipped)
    ]
    for check in (sanitized_batch_norm.modules, sanitized_batch_norm.parts):
        name = f"batch norm, {check.__name__}"
        extras += [(name, partial(check, options.device, dtype)) for dtype in options.dtypes]
    for name, extra in extras:
        try:
            extra()
        except (AssertionError, RuntimeError, ValueError) as error:
            wrong.append(f"{name}: {error}")
    total = len(checks) + len(extras)
    sys.stdout.write("".join(f"WRONG {line}\n" for line in wrong))
    sys.stdout.write(f"{total - len(wrong)} of {total} runs gave the right numbers.\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
