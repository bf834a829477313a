"""Declare the races of batch norm: alone, with ReLU, and with a residual and ReLU.

steadygrad's module adds the residual and applies ReLU itself; it races what people write with
torch's modules.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import relu

from benchmarks.candidates import OURS
from benchmarks.case import DTYPES, Case
from benchmarks.timer import Candidate
from steadygrad import nn

TORCH = "torch"
TORCH_IN_PLACE = "torch in-place"
CUDNN = "torch cuDNN"
CUDNN_IN_PLACE = "torch cuDNN, in-place"
NATIVE = "torch native"
NATIVE_IN_PLACE = "torch native, in-place"

# Maps (adds a residual, applies ReLU) to (group, title) of a layer.
_NAMES = {
    (False, False): ("batch_norm", "batch norm"),
    (False, True): ("batch_norm_relu", "batch norm + ReLU"),
    (True, True): ("batch_norm_add_relu", "batch norm + add + ReLU"),
}
# ReLU's mask after a sum cannot be recomputed from the input, so one bit per element is kept.
_MASK = 1 / 8
# The shape for rehearsals; no vector length divides its channels or pixels.
_SMALL = (4, 19, 5, 5)


@dataclass(frozen=True)
class Layer:
    """Describes one call that is measured."""

    shape: tuple[int, ...]  # shape of the input; the second dimension is the channels
    dtype: torch.dtype  # dtype of the input; parameters are fp32, as under autocast
    channels_last: bool = False  # layout of a 4-D input
    add: bool = False  # whether a residual is added
    relu: bool = False  # whether ReLU follows
    training: bool = True  # whether forward and backward run, or forward alone in eval mode


@contextmanager
def path(name: str | None) -> Iterator[None]:
    """Make the launchers take "two_reads" or "one_read"; with None they choose, as for users."""
    before = os.environ.pop("STEADYGRAD_BATCH_NORM_PATH", None)
    if name is not None:
        os.environ["STEADYGRAD_BATCH_NORM_PATH"] = name
    try:
        yield
    finally:
        os.environ.pop("STEADYGRAD_BATCH_NORM_PATH", None)
        if before is not None:
            os.environ["STEADYGRAD_BATCH_NORM_PATH"] = before


@dataclass(frozen=True)
class Side:
    """Describes one implementation of a layer."""

    name: str  # name in the tables
    in_place: bool = False  # torch adds and applies ReLU in place, as in torchvision's ResNet
    # A context for its calls, which decides whether torch may use cuDNN, or which path ours takes.
    setting: Callable[[], AbstractContextManager[object]] = nullcontext

    def build(self, layer: Layer, device: torch.device) -> Candidate:
        """Return the candidate over tensors of its own, with the same numbers for each side.

        Gradients are returned and not accumulated, since filling `.grad` could cost a copy on one
        side only.
        """
        generator = torch.Generator(device).manual_seed(0)
        layout = torch.channels_last if layer.channels_last else torch.contiguous_format

        def normal(differentiable: bool) -> Tensor:
            made = torch.empty(layer.shape, dtype=layer.dtype, device=device, memory_format=layout)
            return made.normal_(generator=generator).requires_grad_(differentiable)

        inputs = [normal(layer.training) for _ in range(1 + layer.add)]
        grad_output = normal(False) if layer.training else None
        channels, kind = layer.shape[1], f"BatchNorm{1 if len(layer.shape) == 2 else 2}d"
        forward: Callable[[], Tensor]
        if self.name.startswith(OURS):
            module = getattr(nn, kind)(channels, activation="relu" if layer.relu else None)
            forward = partial(module, *inputs)
        else:
            module = getattr(torch.nn, kind)(channels)
            forward = partial(self._torchs, layer, module, *inputs)
        module.to(device).train(layer.training)
        with torch.no_grad():
            module.weight.copy_(torch.rand(channels, generator=generator, device=device) + 0.5)
            module.bias.copy_(torch.randn(channels, generator=generator, device=device))
        sources = [*inputs, module.weight, module.bias]

        def train() -> tuple[Tensor, ...]:
            with self.setting():
                output = forward()
                return (output, *torch.autograd.grad(output, sources, grad_output))

        def evaluate() -> tuple[Tensor, ...]:
            with torch.no_grad(), self.setting():
                return (forward(),)

        return Candidate(self.name, train if layer.training else evaluate)

    def _torchs(
        self, layer: Layer, module: torch.nn.Module, x: Tensor, *residual: Tensor
    ) -> Tensor:
        output: Tensor = module(x)
        for other in residual:
            output = output.add_(other) if self.in_place else output + other
        return relu(output, inplace=self.in_place) if layer.relu else output


def _cudnn(enabled: bool) -> Callable[[], AbstractContextManager[object]]:
    return partial(torch.backends.cudnn.flags, enabled=enabled)


STEADYGRAD = Side(OURS)
PEERS = (Side(TORCH), Side(TORCH_IN_PLACE, in_place=True))
CUDA_PEERS = (
    Side(CUDNN, setting=_cudnn(True)),
    Side(NATIVE, setting=_cudnn(False)),
    Side(CUDNN_IN_PLACE, in_place=True, setting=_cudnn(True)),
    Side(NATIVE_IN_PLACE, in_place=True, setting=_cudnn(False)),
    Side(f"{OURS}, two reads", setting=partial(path, "two_reads")),
    Side(f"{OURS}, one read", setting=partial(path, "one_read")),
)


def peers(layer: Layer, cuda: bool) -> tuple[Side, ...]:
    """Return the implementations that a layer is compared with.

    Without ReLU nothing is done in place, and in eval mode there is only one path.
    """
    return tuple(
        side
        for side in (CUDA_PEERS if cuda else PEERS)
        if (layer.relu or not side.in_place) and (layer.training or not side.name.startswith(OURS))
    )


def batch_norm_case(layer: Layer, *, cuda: bool = False, quick: bool = False) -> Case:
    """Return the case of one layer on a CPU or a GPU.

    The floor counts what forward and backward have to move. Forward reads the input and the
    residual once and writes the output. Backward reads the gradient and the input and writes the
    gradients. With a residual, forward also writes ReLU's mask and backward reads it.
    """
    name, title = _NAMES[layer.add, layer.relu]
    subject = f"{'x'.join(map(str, layer.shape))} {DTYPES[layer.dtype]}"
    if len(layer.shape) == 4:
        subject += " NHWC" if layer.channels_last else " NCHW"
    add, elements, size = int(layer.add), math.prod(layer.shape), layer.dtype.itemsize
    passes = 5 + 2 * add if layer.training else 2 + add
    mask = 2 * _MASK * add if layer.training else 0.0
    inputs = (2 if layer.training else 1) + add
    outputs = 2 + add if layer.training else 1
    sides = (STEADYGRAD, *peers(layer, cuda))
    small = replace(layer, shape=tuple(map(min, layer.shape, _SMALL)))
    group = name if layer.training else f"{name}_eval"
    return Case(
        group=group,
        key=f"{group}/{subject.replace(' ', '_').lower()}",
        title=title if layer.training else f"{title}, eval",
        subject=subject,
        dtype=layer.dtype,
        tensors=1,
        elements=elements,
        bytes_per_element=passes * size + mask,
        working_set_bytes=(inputs + outputs) * elements * size,
        set_bytes=len(sides) * inputs * elements * size,
        spare_bytes=8 * elements * size,
        builds=tuple(partial(side.build, layer) for side in sides),
        cut=lambda: batch_norm_case(small, cuda=cuda, quick=quick),
        quick=quick,
        allocates=True,
        averaged=True,
    )


# Each entry is (shape, dtype, channels_last): few and many channels and pixels, and two 1-D layers.
_CPU_LAYERS = (
    ((32, 64, 56, 56), torch.float32, False),
    ((32, 64, 56, 56), torch.float32, True),
    ((32, 64, 56, 56), torch.bfloat16, True),
    ((32, 512, 7, 7), torch.float32, False),
    ((32, 512, 7, 7), torch.float32, True),
    ((64, 3, 112, 112), torch.float32, False),
    ((64, 3, 112, 112), torch.float32, True),
    ((8, 256, 14, 14), torch.bfloat16, False),
    ((8, 256, 14, 14), torch.bfloat16, True),
    ((4096, 256), torch.float32, False),
    ((100000, 32), torch.float32, False),
)

# (channels, height) of ResNet-50's batch norms, by what follows them. The last one of a block is
# followed by a sum and ReLU; the one in a shortcut has the same shapes and is followed by nothing.
_WIDTHS = ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7))
_SUMS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
_RESNET50 = {(False, False): _SUMS, (False, True): _WIDTHS, (True, True): _SUMS}
_BATCH = 256


def cpu_cases() -> Iterator[Case]:
    """Yield the cases for a CPU: every layer in all fusions, then a few in eval mode."""
    for add, relu_ in _NAMES:
        for number, (shape, dtype, channels_last) in enumerate(_CPU_LAYERS):
            yield batch_norm_case(Layer(shape, dtype, channels_last, add, relu_), quick=number == 1)
    for add, relu_ in _NAMES:
        for shape, dtype, channels_last in (_CPU_LAYERS[0], _CPU_LAYERS[2], _CPU_LAYERS[9]):
            yield batch_norm_case(Layer(shape, dtype, channels_last, add, relu_, training=False))


def cuda_cases() -> Iterator[Case]:
    """Yield the cases for a GPU, the layers of ResNet-50.

    A time limit may end the run, so the two largest shapes of each fusion, dtype and layout come
    first, and the least important cases last.
    """
    halves = (torch.float16, torch.bfloat16)
    few, rest = (
        {fusion: shapes[part] for fusion, shapes in _RESNET50.items()}
        for part in (slice(2), slice(2, None))
    )
    order = (
        *((dtype, last, few) for last in (True, False) for dtype in (*halves, torch.float32)),
        *((dtype, True, rest) for dtype in halves),
        *((torch.float32, last, rest) for last in (True, False)),
    )
    for dtype, channels_last, fusions in order:
        for (add, relu_), chosen in fusions.items():
            for channels, height in chosen:
                layer = Layer((_BATCH, channels, height, height), dtype, channels_last, add, relu_)
                quick = dtype == torch.float16 and channels_last and (channels, height) == (256, 56)
                yield batch_norm_case(layer, cuda=True, quick=quick)
    for add, relu_ in _NAMES:
        layer = Layer((_BATCH, 256, 56, 56), torch.float16, True, add, relu_, training=False)
        yield batch_norm_case(layer, cuda=True)
