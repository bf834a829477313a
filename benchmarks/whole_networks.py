"""Measure what `convert_batchnorm` does to a training step's time and a residual block's memory.

python -m benchmarks.whole_networks
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from collections.abc import Callable, Sequence
from itertools import accumulate, product

# This silences torch's profiler, which reads the variable when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import show, table_of
from benchmarks.timer import Candidate, Race
from steadygrad.nn.conversion_report import conversion_report
from steadygrad.nn.convert import convert_batchnorm
from steadygrad.nn.known_blocks import register_block
from tests.nn.networks import NETWORKS, STEPS, BasicBlock, Bottleneck

BATCH, SIZE, LENGTH, THREADS = 8, 64, 1024, 2
SECONDS = 15.0  # for each network, precision and layout
LAYOUTS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda model: model,
    "converted": lambda model: convert_batchnorm(model, fuse=False),
    "fused": convert_batchnorm,
}


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # bf16 by autocast


def vgg11() -> nn.Sequential:
    """Return VGG-11 with batch norms, and one linear layer at its end."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, pooled in zip(
        (64, 128, 256, 256, 512, 512, 512, 512), (1, 1, 0, 1) * 2, strict=True
    ):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(True)]
        layers += [nn.MaxPool2d(2)] * pooled
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def conv_net_1d() -> nn.Sequential:
    """Return a network of four convolutions over sequences of 4 channels."""
    layers: list[nn.Module] = []
    inputs = 4
    for outputs in (64, 128, 256, 256):
        layers += [nn.Conv1d(inputs, outputs, 5, padding=2), nn.BatchNorm1d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool1d(2))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def _own(model: nn.Module, layout: str) -> nn.Module:
    """Return a copy of a model with its convolutions in a memory layout."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[layout])
    return model


def training_step(
    model: nn.Module, input: Tensor, target: Tensor, precision: torch.dtype
) -> Callable[[], object]:
    """Return a function that makes a forward, backward and SGD step on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            value = loss(model(input), target)
        value.backward()
        optimizer.step()

    return step


def speed() -> Table:
    """Return a table of median times of a training step, before and after the conversion."""
    title = f"Training step, batch {BATCH} at {SIZE}x{SIZE} (1-D: {LENGTH}), {THREADS} threads"
    counts = ("batch\nnorms", "+ReLU", "+ReLU6", "+add\n+ReLU", "+add", "not\nfused")
    times = ("torch\nms", "converted\nms", "fused\nms", "torch /\nconverted", "torch /\nfused")
    table = table_of(title, ("network", "precision", "layout"), (*counts, *times))
    images, sequences = (BATCH, 3, SIZE, SIZE), (BATCH, 4, LENGTH)
    networks: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]
    networks = {name: (make, images) for name, make in (*NETWORKS.items(), ("VGG-11", vgg11))}
    networks["1-D ConvNet"] = conv_net_1d, sequences
    for name, (make, shape) in networks.items():
        torch.manual_seed(20240229)
        model = make()
        report = conversion_report(convert_batchnorm(copy.deepcopy(model)))
        fused = (
            report.operations.get(f"batch norm + {o}", 0)
            for o in ("ReLU", "ReLU6", "add + ReLU", "add")
        )
        numbers = (len(report.findings), *fused, len(report.not_fused) + len(report.left))
        layouts = LAYOUTS if len(shape) == 4 else ("NCHW",)
        for layout, (precision, dtype) in product(layouts, PRECISIONS.items()):
            input = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
            target = torch.randint(1000, (BATCH,))
            steps = {
                kind: training_step(convert(_own(model, layout)), input, target, dtype)
                for kind, convert in KINDS.items()
            }
            race = Race([Candidate(kind, step) for kind, step in steps.items()])
            race.warm_up(2)
            ms = [1e3 * timing.median() for timing in race.run(SECONDS, 5, 1000)]
            ratios = (f"{ms[0] / ms[1]:.2f}", f"{ms[0] / ms[2]:.2f}")
            row = (*map(str, numbers), *(f"{t:.1f}" for t in ms), *ratios)
            table.add_row(name, precision, layout, *row)
    return table


def held_bytes(run: Callable[[], object]) -> list[int]:
    """Return the bytes that a call holds after each allocation and release that torch counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    ordered = sorted(events, key=lambda event: event.start_ns())
    return list(accumulate((event.nbytes() for event in ordered), initial=0))


def block_memory(block: nn.Module, shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    """Return the bytes that a block's forward keeps, with its output, and the peak of both passes."""
    block = _own(block, layout)
    input, grad = (torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    inputs = [input.requires_grad_(), *block.parameters()]

    def forward() -> Tensor:
        output: Tensor = block(input.view_as(input))
        return output

    def both() -> object:
        return torch.autograd.grad(forward(), inputs, grad)

    both()  # the first call leaves memory behind, so it is not measured
    return held_bytes(forward)[-1], max(held_bytes(both))


def memory() -> Table:
    """Return a table of the memory that a residual block holds, in MiB and in units of its input."""
    title = (
        f"Memory of a residual block, batch {BATCH} at {SIZE}x{SIZE}, fp32, kept for backward and "
        "at most:\nMiB (sizes of the input)"
    )
    kinds = [f"{kind},\n{what}" for what in ("kept", "peak") for kind in KINDS]
    table = table_of(title, ("block", "layout"), ("input", *kinds, "peak: fused\n/ torch"))
    blocks = {
        "basic, 64 channels": (BasicBlock(64, 64), (BATCH, 64, SIZE, SIZE)),
        "bottleneck, 256 channels": (Bottleneck(256, 64), (BATCH, 256, SIZE, SIZE)),
    }
    for name, (block, shape) in blocks.items():
        one = 4 * math.prod(shape)
        for layout in LAYOUTS:
            found = [
                block_memory(convert(copy.deepcopy(block)), shape, layout)
                for convert in KINDS.values()
            ]
            kept, peaks = zip(*found, strict=True)
            cells = [f"{held / 2**20:.1f} ({held / one:.2f})" for held in (*kept, *peaks)]
            table.add_row(name, layout, f"{one / 2**20:.1f}", *cells, f"{peaks[-1] / peaks[0]:.2f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.whole_networks", description=__doc__)
    parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    for block, steps in STEPS.items():
        register_block(block, steps)
    show(Console(), [memory()])
    show(Console(), [speed()])


if __name__ == "__main__":
    main()
