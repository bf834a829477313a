"""Declare the parameter shapes of the benchmarked models, so that no model library is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelShapes:
    """Holds the parameter shapes of one model, in the order in which the model lists them."""

    key: str  # short name used in case keys
    title: str  # name for people
    shapes: tuple[Shape, ...]  # one per parameter tensor

    @property
    def tensors(self) -> int:
        """Return the number of parameter tensors."""
        return len(self.shapes)

    @property
    def elements(self) -> int:
        """Return the number of elements in all parameter tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def cut(self, tensors: int = 8, longest: int = 2**11) -> ModelShapes:
        """Return the first tensors, flattened and cut to `longest` elements each, under the same key."""
        shapes = tuple((min(math.prod(shape), longest),) for shape in self.shapes[:tensors])
        return ModelShapes(self.key, f"{self.title}, cut", shapes)


def resnet50() -> ModelShapes:
    """Return ResNet-50 (He et al. 2016, torchvision's layout): 161 tensors, 25,557,032 elements."""
    shapes: list[Shape] = []

    def convolution(channels_out: int, channels_in: int, size: int) -> None:
        shapes.extend(((channels_out, channels_in, size, size), (channels_out,), (channels_out,)))

    convolution(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, channels, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, channels, 1)
            channels = 4 * width
    return ModelShapes("resnet50", "ResNet-50", (*shapes, (1000, channels), (1000,)))


def gpt2_small() -> ModelShapes:
    """Return GPT-2 small with tied embeddings (Radford et al. 2019): 148 tensors, 124,439,808 elements."""
    width = 768
    norm: tuple[Shape, ...] = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    feed_forward = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    block = (*norm, *attention, *norm, *feed_forward)
    return ModelShapes("gpt2", "GPT-2 small", ((50257, width), (1024, width), *block * 12, *norm))


def lora(count: int = 96, width: int = 768) -> ModelShapes:
    """Return low-rank adapters (Hu et al. 2021) of rank 8: `count` matrices of 8 x `width`."""
    return ModelShapes(f"lora{count}", f"LoRA {count} x 8 x {width}", ((8, width),) * count)


def many_small(count: int = 2000, size: int = 32) -> ModelShapes:
    """Return `count` vectors of `size` elements, which fit in cache and show the cost per tensor."""
    return ModelShapes("small", f"{count:,} x {size}", ((size,),) * count)


def one_tensor(log2_elements: int) -> ModelShapes:
    """Return one vector of 2**`log2_elements` elements."""
    key = f"one_2e{log2_elements}"
    return ModelShapes(key, f"1 x 2^{log2_elements}", ((2**log2_elements,),))


# A policy for reinforcement learning: 17 observations, two layers of 64, 6 actions.
POLICY = ModelShapes("policy", "policy network", ((64, 17), (64,), (64, 64), (64,), (6, 64), (6,)))
# A perceptron for 28 x 28 digits with two layers of 128: 6 tensors, 118,282 elements.
DIGITS = ModelShapes(
    "digits", "digits MLP", ((128, 784), (128,), (128, 128), (128,), (10, 128), (10,))
)
# The token embedding of GPT-2; a batch uses few of the rows.
EMBEDDING = ModelShapes("embedding", "embedding", ((50257, 768),))
