"""Parameter shapes of the models in the benchmarks, written out so that no library is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelShapes:
    """The parameter shapes of one model, in the order in which the model lists them.

    Attributes:
        key: short name used in case keys and on the command line.
        title: name for people.
        shapes: one shape per parameter tensor.
    """

    key: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def tensors(self) -> int:
        """Number of parameter tensors."""
        return len(self.shapes)

    @property
    def elements(self) -> int:
        """Number of elements in all parameter tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def cut(self, tensors: int = 8, longest: int = 2**11) -> ModelShapes:
        """The first tensors, flattened and cut to `longest` elements each, under the same key."""
        shapes = tuple((min(math.prod(shape), longest),) for shape in self.shapes[:tensors])
        return ModelShapes(self.key, f"{self.title}, cut", shapes)


def _convolution(channels_out: int, channels_in: int, size: int) -> Iterator[Shape]:
    """A convolution without bias, then the weight and bias of its batch norm."""
    yield (channels_out, channels_in, size, size)
    yield (channels_out,)
    yield (channels_out,)


def _resnet50() -> Iterator[Shape]:
    expansion = 4
    yield from _convolution(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _convolution(width, channels, 1)
            yield from _convolution(width, width, 3)
            yield from _convolution(expansion * width, width, 1)
            if block == 0:
                yield from _convolution(expansion * width, channels, 1)
            channels = expansion * width
    yield (1000, channels)
    yield (1000,)


def _gpt2_small() -> Iterator[Shape]:
    width = 768
    yield (50257, width)
    yield (1024, width)
    for _ in range(12):
        yield from ((width,), (width,))
        yield from ((width, 3 * width), (3 * width,))
        yield from ((width, width), (width,))
        yield from ((width,), (width,))
        yield from ((width, 4 * width), (4 * width,))
        yield from ((4 * width, width), (width,))
    yield from ((width,), (width,))


def resnet50() -> ModelShapes:
    """ResNet-50 (He et al. 2016, torchvision's layout): 161 tensors, 25,557,032 elements."""
    return ModelShapes("resnet50", "ResNet-50", tuple(_resnet50()))


def gpt2_small() -> ModelShapes:
    """GPT-2 small with tied embeddings (Radford et al. 2019): 148 tensors, 124,439,808 elements."""
    return ModelShapes("gpt2", "GPT-2 small", tuple(_gpt2_small()))


def many_small(count: int = 2000, size: int = 32) -> ModelShapes:
    """`count` vectors of `size` elements: they fit in cache, so they show the cost per tensor."""
    return ModelShapes("small", f"{count:,} x {size}", ((size,),) * count)


def one_tensor(log2_elements: int) -> ModelShapes:
    """One vector of 2**`log2_elements` elements."""
    key = f"one_2e{log2_elements}"
    return ModelShapes(key, f"1 x 2^{log2_elements}", ((2**log2_elements,),))
