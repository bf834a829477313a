"""Runs every operation and batch-norm kernel once on small tensors of odd sizes, which is short enough for a sanitizer.

    compute-sanitizer --tool memcheck python -m tests.sanitize.every_kernel_once

torch has to allocate every tensor separately for that: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

import steadygrad as sg
from benchmarks.batch_norm import path
from benchmarks.rehearsal import emulate
from steadygrad import _kernels, memory, nn
from steadygrad.self_check import TOLERANCES, check_kernels

# The number of tensors exceeds what fits into the parameters of one launch.
_MANY = 4200
# Channels and pixels that no vector width divides, few channels with many pixels, and 2-D input.
_SHAPES = ((5, 19, 7, 7), (3, 2, 41, 43), (67, 70))
# The largest error against torch's fp64, relative to the largest element.
_OF_BATCH_NORM = {"float32": 5e-6, "float64": 1e-12, "bfloat16": 1.6e-2, "float16": 2e-3}
_EPS = 1e-5


def _drawn(device: str, *shape: int, seed: int = 0) -> Tensor:
    # The numbers are drawn on the host, since torch's own kernels are not under test.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _parameter(device: str, *shape: int) -> torch.nn.Parameter:
    param = torch.nn.Parameter(_drawn(device, *shape))
    param.grad = _drawn(device, *shape, seed=1)
    return param


def many_tensors(device: str) -> None:
    flat = torch.linspace(-1.0, 1.0, 3 * _MANY).to(device)
    norm = sg.get_total_norm(flat.split(3))
    torch.testing.assert_close(norm.cpu(), flat.cpu().norm())


def strided(device: str) -> None:
    param = _parameter(device, 3, 5, 7, 9)
    assert param.grad is not None
    param.grad = param.grad.to(memory_format=torch.channels_last)
    tail = torch.nn.Parameter(torch.ones(37, device=device)[3:])
    tail.grad = torch.ones(71, device=device)[1::2][:34]
    before = tail.detach().cpu().clone()
    sg.Stabilizer(torch.optim.AdamW([param, tail], lr=0.1), max_norm=1.0, l1=0.1).step()
    assert not torch.equal(tail.detach().cpu(), before)


def skipped(device: str) -> None:
    param = _parameter(device, 4099)
    assert param.grad is not None
    param.grad[4098] = float("nan")
    before = param.detach().cpu().clone()
    optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=0.1, momentum=0.9), max_norm=1.0)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert torch.equal(param.detach().cpu(), before)


def _layered(device: str, dtype: str, shape: tuple[int, ...], last: bool, seed: int) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    made = _drawn("cpu", *shape, seed=seed).to(getattr(torch, dtype))
    return made.contiguous(memory_format=layout).to(device)


def _compare(what: str, dtype: str, got: Tensor, want: Tensor) -> None:
    want = want.detach()
    error = (got.detach().cpu().double() - want).abs().max() / want.abs().max()
    if not error <= _OF_BATCH_NORM[dtype]:  # also false for NaN
        raise AssertionError(f"{what}, {dtype}: error {error:.3g}")


def batch_norms(device: str, dtype: str) -> None:
    """Run forward and backward of the modules: fusions and layouts, both paths of training, evaluation."""
    fusions = ((False, False), (False, True), (True, True))
    for taken, shape, last, (add, relu) in product(
        ("two_reads", "one_read", None), _SHAPES, (False, True), fusions
    ):
        if len(shape) == 4 or not last:
            with path(taken):
                _batch_norm(device, dtype, shape, last, add, relu, training=taken is not None)


def _batch_norm(
    device: str,
    dtype: str,
    shape: tuple[int, ...],
    last: bool,
    add: bool,
    relu: bool,
    *,
    training: bool,
) -> None:
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    parameters = torch.float64 if dtype == "float64" else torch.float32
    module = kind(shape[1], activation="relu" if relu else None, dtype=parameters)
    module.to(device).train(training)
    *numbers, grad_output = (_layered(device, dtype, shape, last, n) for n in range(2 + add))
    inputs = [number.clone().requires_grad_() for number in numbers]
    output = module(*inputs)
    sources = [*inputs, module.weight, module.bias]
    got = [output, *torch.autograd.grad(output, sources, grad_output)]

    exact = [number.cpu().double().requires_grad_() for number in numbers]
    weight = torch.ones(shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(shape[1], dtype=torch.float64, requires_grad=True)
    wanted = torch.nn.functional.batch_norm(
        *(exact[0], torch.zeros(shape[1]).double(), torch.ones(shape[1]).double(), weight, bias),
        training=training,
        eps=_EPS,
    )
    wanted = wanted + exact[1] if add else wanted
    # The kernel rounds only once, so the expected ReLU mask is taken from its own output.
    wanted = wanted * (output.detach().cpu() > 0) if relu else wanted
    grads = torch.autograd.grad(wanted, [*exact, weight, bias], grad_output.cpu().double())
    where = f"of {shape}, channels_last={last}, training={training}"
    for index, (ours, theirs) in enumerate(zip(got, (wanted, *grads), strict=True)):
        _compare(f"output or gradient {index} {where}", dtype, ours, theirs)


def batch_norm_in_parts(device: str, dtype: str) -> None:
    """Run the kernels of synchronised statistics on two parts of a batch, and compare with the whole batch."""
    whole, grad = (_layered("cpu", dtype, _SHAPES[0], True, seed) for seed in range(2))
    channels = whole.shape[1]
    inputs = [part.to(device) for part in whole.split([2, 3])]
    grads = [part.to(device) for part in grad.split([2, 3])]
    allocate = memory.allocator(inputs[0].device)

    def fp64(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.float64, device=device)

    gathered, statistics = fp64(2, 2 * channels + 1), fp64(2 * channels + 1)
    for part, own in zip(inputs, gathered, strict=True):
        _kernels.batch_norm_statistics(part, own, allocate)
    mean, var = (torch.zeros(channels).to(device) for _ in range(2))
    _kernels.batch_norm_combine(gathered, statistics, mean, var, None, 1.0)
    outputs = [torch.empty_like(part) for part in inputs]
    constants = (None, None, statistics)
    for part, output in zip(inputs, outputs, strict=True):
        _kernels.batch_norm_normalize(part, None, *constants, None, None, _EPS, True, output, None)
    sums = fp64(2, 2 * channels)
    for part, g, own in zip(inputs, grads, sums, strict=True):
        _kernels.batch_norm_backward_sums(g, part, None, *constants, _EPS, True, own, allocate)
    total = (sums[0] + sums[1]).contiguous()
    grad_inputs = [torch.empty_like(part) for part in inputs]
    for part, g, out in zip(inputs, grads, grad_inputs, strict=True):
        _kernels.batch_norm_backward_input(g, part, None, *constants, total, _EPS, True, out, None)

    exact = whole.double().requires_grad_()
    wanted = torch.nn.functional.batch_norm(exact, None, None, training=True, eps=_EPS)
    wanted = wanted * (torch.cat(outputs).cpu() > 0)
    (wanted_grad,) = torch.autograd.grad(wanted, exact, grad.double())
    _compare("output of parts", dtype, torch.cat(outputs), wanted)
    _compare("grad_input of parts", dtype, torch.cat(grad_inputs), wanted_grad)
    _compare("running_mean", "float32", mean, exact.mean((0, 2, 3)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="where the tensors live (default: cuda)")
    parser.add_argument("--dtypes", nargs="+", default=tuple(TOLERANCES["norm"]), metavar="DTYPE")
    parser.add_argument("--emulate", action="store_true", help="run emulated kernels on the CPU")
    options = parser.parse_args(argv)
    if options.emulate:
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
        for extra in (many_tensors, strided, skipped)
    ]
    extras += [
        (extra.__name__, partial(extra, options.device, dtype))
        for extra, dtype in product((batch_norms, batch_norm_in_parts), options.dtypes)
    ]
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
