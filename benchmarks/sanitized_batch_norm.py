"""Every batch-norm kernel once on small tensors of odd sizes, for `sanitized_steps.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from steadygrad import _kernels, memory, nn

# Channels and pixels that no vector divides, few channels with many pixels, and 2-D input.
_SHAPES = ((5, 19, 7, 7), (3, 2, 41, 43), (67, 70))
# Largest error beside torch's fp64, as a share of the largest element.
_TOLERANCES = {"float32": 5e-6, "float64": 1e-12, "bfloat16": 1.6e-2, "float16": 2e-3}
_EPS = 1e-5

# Read by the launchers at each call; without it they choose by themselves.
_PATH_VARIABLE = "STEADYGRAD_BATCH_NORM_PATH"


@contextmanager
def _path(name: str | None) -> Iterator[None]:
    before = os.environ.pop(_PATH_VARIABLE, None)
    try:
        if name is not None:
            os.environ[_PATH_VARIABLE] = name
        yield
    finally:
        os.environ.pop(_PATH_VARIABLE, None)
        if before is not None:
            os.environ[_PATH_VARIABLE] = before


def _drawn(shape: tuple[int, ...], dtype: str, channels_last: bool, seed: int) -> Tensor:
    # Drawn on the host: torch's own kernels are not what is being looked at.
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return made.to(getattr(torch, dtype)).contiguous(memory_format=layout)


def _compare(what: str, dtype: str, got: Tensor, want: Tensor) -> None:
    want = want.detach()
    error = (got.detach().cpu().double() - want).abs().max() / want.abs().max()
    if not error <= _TOLERANCES[dtype]:  # NaN is wrong too
        raise AssertionError(f"{what}, {dtype}: error {error:.3g}")


def modules(device: str, dtype: str) -> None:
    """Forward and backward of the modules: fusions and layouts, both paths of training, eval."""
    for path in ("two_reads", "one_read", None):
        with _path(path):
            for shape in _SHAPES:
                for channels_last in (False, True)[: 1 + (len(shape) == 4)]:
                    for add, relu in ((False, False), (False, True), (True, True)):
                        training = path is not None
                        _module(device, dtype, shape, channels_last, add, relu, training)


def _module(
    device: str,
    dtype: str,
    shape: tuple[int, ...],
    channels_last: bool,
    add: bool,
    relu: bool,
    training: bool,
) -> None:
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    parameters = torch.float64 if dtype == "float64" else torch.float32
    module = kind(shape[1], activation="relu" if relu else None, dtype=parameters)
    module.to(device).train(training)
    numbers = [_drawn(shape, dtype, channels_last, seed) for seed in range(3)]
    grad_output = numbers.pop()
    inputs = [number.to(device).requires_grad_() for number in numbers[: 1 + add]]
    output = module(*inputs)
    sources = [*inputs, module.weight, module.bias]
    got = [output, *torch.autograd.grad(output, sources, grad_output.to(device))]

    exact = [number.double().requires_grad_() for number in numbers[: 1 + add]]
    weight = torch.ones(shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(shape[1], dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros_like(bias), torch.ones_like(weight)
    wanted = torch.nn.functional.batch_norm(
        exact[0], mean.detach(), var.detach(), weight, bias, training, 0.1, _EPS
    )
    wanted = wanted + exact[1] if add else wanted
    # The kernel rounds only once, so ReLU's mask is that of its own output.
    wanted = wanted * (output.detach().cpu() > 0) if relu else wanted
    grads = torch.autograd.grad(wanted, [*exact, weight, bias], grad_output.double())
    names = ("output", "grad_input", *(("grad_residual",) if add else ()))
    for name, ours, theirs in zip(
        (*names, "grad_weight", "grad_bias"), got, (wanted, *grads), strict=True
    ):
        where = f"{name} of {shape}, channels_last={channels_last}, training={training}"
        _compare(where, dtype, ours, theirs)


def parts(device: str, dtype: str) -> None:
    """The kernels of synchronised statistics: two parts of a batch, beside the whole of it."""
    whole, grad = (_drawn(_SHAPES[0], dtype, True, seed) for seed in range(2))
    channels = whole.shape[1]
    inputs = [part.to(device) for part in whole.split([2, 3])]
    grads = [part.to(device) for part in grad.split([2, 3])]
    allocate = memory.allocator(inputs[0].device)

    def vector(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=device)

    gathered = torch.zeros(2, 2 * channels + 1, dtype=torch.float64, device=device)
    for part, statistics in zip(inputs, gathered, strict=True):
        _kernels.batch_norm_statistics(part, statistics, allocate)
    statistics = vector(2 * channels + 1)
    mean, var = (torch.zeros(channels).to(device) for _ in range(2))
    _kernels.batch_norm_combine(gathered, statistics, mean, var, None, 1.0)
    outputs = [torch.empty_like(part) for part in inputs]
    constants = (None, None, statistics)
    for part, output in zip(inputs, outputs, strict=True):
        _kernels.batch_norm_normalize(part, None, *constants, None, None, _EPS, True, output, None)
    sums = torch.zeros(2, 2 * channels, dtype=torch.float64, device=device)
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
