"""Batch norm alone, with ReLU, and with a residual and ReLU: shapes, layouts and dtypes measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import batch_norm_candidates as candidates
from benchmarks.batch_norm_candidates import Layer
from benchmarks.case import Build

# (group, title) of a layer, by whether it adds and whether it rectifies.
_NAMES = {
    (False, False): ("batch_norm", "batch norm"),
    (False, True): ("batch_norm_relu", "batch norm + ReLU"),
    (True, True): ("batch_norm_add_relu", "batch norm + add + ReLU"),
}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# ReLU's mask behind a sum cannot be found again from the input: one bit an element is kept.
_MASK = 1 / 8

# For rehearsals; no vector divides the channels or the pixels.
_SMALL = (4, 19, 5, 5)


@dataclass(frozen=True)
class BatchNormCase:
    """One layer on one device.

    Attributes:
        layer: what is measured.
        cuda: whether the peers are those of a GPU.
        quick: part of the quick table.
    """

    layer: Layer
    cuda: bool = False
    quick: bool = False

    # Kernels are compared, and a training loop's host runs ahead of them.
    clock = "device"
    host_cost = False
    allocates = True
    averaged = True
    tensors = 1

    @property
    def group(self) -> str:
        """Short name of the fusion, first half of the key."""
        name, _ = _NAMES[self.layer.add, self.layer.relu]
        return name if self.layer.training else f"{name}_eval"

    @property
    def title(self) -> str:
        """Name of the fusion, for people: forward and backward, unless it says eval."""
        _, name = _NAMES[self.layer.add, self.layer.relu]
        return name if self.layer.training else f"{name}, eval"

    @property
    def subject(self) -> str:
        """Shape, dtype and layout, for people."""
        layer = self.layer
        parts = ["x".join(map(str, layer.shape)), _DTYPES[layer.dtype]]
        if len(layer.shape) == 4:
            parts.append("NHWC" if layer.channels_last else "NCHW")
        return " ".join(parts)

    @property
    def key(self) -> str:
        """Name of the case: group/shape_dtype_layout."""
        return f"{self.group}/{self.subject.replace(' ', '_').lower()}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the input."""
        return self.layer.dtype

    @property
    def elements(self) -> int:
        """Elements of the input."""
        return math.prod(self.layer.shape)

    @property
    def _passes(self) -> tuple[int, float]:
        """How often an element is read or written at least, and bytes of mask for each."""
        add = int(self.layer.add)
        forward, backward = 2 + add, 3 + add
        if not self.layer.training:
            return forward, 0.0
        # Forward writes the mask, backward reads it.
        return forward + backward, 2 * _MASK * add

    @property
    def floor(self) -> str:
        """What moves, in sizes of the input."""
        passes, mask = self._passes
        return f"moves {passes} x input" + (" + mask" if mask else "")

    @property
    def bytes_per_element(self) -> float:
        """Input read once and output written forward; gradient and input read, one written back."""
        passes, mask = self._passes
        return passes * self.layer.dtype.itemsize + mask

    @property
    def floor_bytes(self) -> int:
        """Bytes that have to move in one call."""
        return round(self.bytes_per_element * self.elements)

    @property
    def _inputs(self) -> int:
        return (2 if self.layer.training else 1) + self.layer.add

    @property
    def working_set_bytes(self) -> int:
        """Bytes of what one call of ours reads and writes: every tensor once."""
        outputs = 2 + self.layer.add if self.layer.training else 1
        return (self._inputs + outputs) * self.elements * self.layer.dtype.itemsize

    @property
    def builds(self) -> tuple[Build, ...]:
        """Ours first, then torch's."""
        chosen = candidates.peers(self.layer, self.cuda)
        makes = (candidates.ours, *(peer.build for peer in chosen))
        return tuple(partial(make, self.layer) for make in makes)

    def memory_needed(self, buffer_sets: int = 1) -> int:
        """Bytes to have free: every candidate's inputs, and what one call of a peer allocates."""
        kept = len(self.builds) * buffer_sets * self._inputs
        return (kept + 8) * self.elements * self.layer.dtype.itemsize

    def cut(self) -> BatchNormCase:
        """The same on one small shape: fusion, dtype and layout stay."""
        shape = tuple(map(min, self.layer.shape, _SMALL))
        return dataclasses.replace(self, layer=dataclasses.replace(self.layer, shape=shape))


_FUSIONS = tuple(_NAMES)
_HALF = (torch.bfloat16, torch.float16)

# shape, dtype, channels_last. Few and many channels, few and many pixels, and two of 1-D layers.
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

# (channels, height) of ResNet-50's batch norms, by what follows them there. The last of a block is
# followed by the sum and ReLU; the one in a shortcut, of the same shapes, by nothing.
_WIDTHS = ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7))
_SUMS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
_RESNET50 = {(False, False): _SUMS, (False, True): _WIDTHS, (True, True): _SUMS}
_BATCH = 256


def cpu_cases() -> Iterator[BatchNormCase]:
    """The plan on a CPU: every layer in all fusions, then a few in eval mode."""
    for add, relu in _FUSIONS:
        for number, (shape, dtype, channels_last) in enumerate(_CPU_LAYERS):
            layer = Layer(shape, dtype, channels_last, add, relu)
            yield BatchNormCase(layer, quick=number == 1)
    for add, relu in _FUSIONS:
        for shape, dtype, channels_last in (_CPU_LAYERS[0], _CPU_LAYERS[2], _CPU_LAYERS[9]):
            layer = Layer(shape, dtype, channels_last, add, relu, training=False)
            yield BatchNormCase(layer)


def cuda_cases() -> Iterator[BatchNormCase]:
    """The plan on a GPU, ResNet-50's layers; what matters least comes last, for a limit may end it."""
    quick = (256, 56)
    for dtype in _HALF:
        yield from _resnet50(dtype, True, _RESNET50, quick if dtype == torch.float16 else None)
    for channels_last in (True, False):
        yield from _resnet50(torch.float32, channels_last, _RESNET50)
    few = {fusion: shapes[:2] for fusion, shapes in _RESNET50.items()}
    for dtype in _HALF:
        yield from _resnet50(dtype, False, few)
    for add, relu in _FUSIONS:
        layer = Layer((_BATCH, 256, 56, 56), torch.float16, True, add, relu, training=False)
        yield BatchNormCase(layer, cuda=True)


def _resnet50(
    dtype: torch.dtype,
    channels_last: bool,
    shapes: Mapping[tuple[bool, bool], tuple[tuple[int, int], ...]],
    quick: tuple[int, int] | None = None,
) -> Iterator[BatchNormCase]:
    for (add, relu), chosen in shapes.items():
        for channels, height in chosen:
            layer = Layer((_BATCH, channels, height, height), dtype, channels_last, add, relu)
            yield BatchNormCase(layer, cuda=True, quick=(channels, height) == quick)
