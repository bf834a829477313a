"""Batches that ranks share, and what one process finds for the whole of them in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product

import torch
import torch.nn.functional as F
from torch import Tensor

from steadygrad.reference.batch_norm import CEILINGS, Activation

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """Some training steps on batches whose samples are distributed over ranks."""

    counts: tuple[int, ...]  # number of samples of each rank
    shape: tuple[int, ...]  # shape of a sample, channels first
    dtype: torch.dtype = torch.float32
    fusion: str = "plain"
    channels_last: bool = False
    mean: float = 0.0
    momentum: float | None = 0.1
    affine: bool = True
    steps: int = 1

    def __str__(self) -> str:
        words = [f"{n}+" for n in self.counts]
        shape = "x".join(map(str, self.shape))
        options = [str(self.dtype)[6:], "last" if self.channels_last else "first", f"{self.mean:g}"]
        options += [f"momentum={self.momentum}"] if self.momentum != 0.1 else []
        options += [] if self.affine else ["affine=False"]
        return "-".join(["".join(words)[:-1], shape, self.fusion, *options])

    @property
    def activation(self) -> Activation | None:
        return next((a for a in CEILINGS if a and self.fusion.endswith(a)), None)

    @property
    def adds(self) -> bool:
        return self.fusion.startswith("add")

    @property
    def vector_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass
class Batch:
    """The tensors of one step, of the whole batch or of one rank."""

    input: Tensor
    residual: Tensor | None
    grad_output: Tensor


def _uneven(dtype: torch.dtype, fusion: str, channels_last: bool) -> list[Case]:
    return [
        Case(counts, (5, 3, 4), dtype, fusion, channels_last)
        for counts in ((5, 2), (3, 0), (4, 0, 3))
    ]


CASES = [
    case
    for dtype, fusion, channels_last in product(
        (torch.float32, torch.float16), ("plain", "relu", "add_relu"), (False, True)
    )
    for case in _uneven(dtype, fusion, channels_last)
]
CASES += [
    *_uneven(torch.bfloat16, "add_relu", True),
    *_uneven(torch.float64, "add_relu", False),
    *_uneven(torch.float32, "add", False),
    *_uneven(torch.float32, "relu6", True),
    *_uneven(torch.float64, "add_relu6", False),
    Case((0, 0, 6), (4, 5)),
    Case((1, 6, 2), (3,)),
    Case((1, 6, 2), (3,), fusion="add_relu"),
    Case((1, 1), (3,)),
    Case((2, 0, 3), (3, 2, 3, 2), fusion="relu", channels_last=True),
    Case((2, 3), (1, 4, 4), fusion="add_relu"),
    Case((3, 1), (4, 1, 1), fusion="add_relu"),
    Case((5, 2), (5, 3, 4), affine=False, fusion="relu"),
    Case((5, 2), (5, 3, 4), momentum=None, steps=3),
    Case((4, 0, 3), (5, 3, 4), momentum=None, steps=3),
    # a mean that cancels, and that differs much between the ranks
    *(Case((7, 5), (3, 8, 8), mean=1000.0, channels_last=last) for last in (False, True)),
    Case((7, 0, 5), (3, 8, 8), mean=1000.0, fusion="add_relu"),
    # counts that float16 and bfloat16 round, and one that float16 cannot hold
    Case((3, 2), (2, 2049), torch.float16),
    Case((3, 2), (2, 2049), torch.bfloat16, channels_last=True),
    Case((1, 1, 1), (1, 300, 300), torch.float16, fusion="relu"),
]

# These cases run on the emulated CUDA kernels, where the host does not wait for the device.
EMULATED_CASES = [
    *_uneven(torch.float32, "add_relu", True),
    *_uneven(torch.float32, "relu", False),
    *_uneven(torch.float32, "add_relu6", False)[2:],
    *_uneven(torch.bfloat16, "plain", True),
    Case((4, 0, 3), (5, 3, 4), momentum=None, steps=3),
]


def memory_format(case: Case) -> torch.memory_format:
    formats = {3: torch.channels_last, 4: torch.channels_last_3d}
    last = case.channels_last and len(case.shape) in formats
    return formats[len(case.shape)] if last else torch.contiguous_format


def laid_out(case: Case, tensor: Tensor) -> Tensor:
    """Return the tensor in the case's dtype and layout."""
    tensor = tensor.to(case.dtype)
    if case.channels_last and len(case.shape) == 2:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous(memory_format=memory_format(case))


def vectors(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias."""
    if not case.affine:
        return None, None
    generator = torch.Generator().manual_seed(7)
    channels = case.shape[0]
    weight = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    if case.activation == "relu6":
        weight *= 4  # so that some elements reach the ceiling
    return weight.to(case.vector_dtype), bias.to(case.vector_dtype)


def whole_batch(case: Case, step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    shape = (sum(case.counts), *case.shape)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    samples = torch.arange(shape[0], dtype=torch.float64).view(-1, *[1] * len(case.shape))
    input = laid_out(case, normal() + case.mean * (1 + samples) / shape[0])
    residual = laid_out(case, normal()) if case.adds else None
    return Batch(input, residual, laid_out(case, normal()))


def part_of(case: Case, whole: Batch, rank: int) -> Batch:
    """Return what this rank holds; an empty rank holds nothing."""
    end = list(accumulate(case.counts))[rank]
    rows = slice(end - case.counts[rank], end)

    def part(tensor: Tensor) -> Tensor:
        return tensor[rows].clone(memory_format=torch.preserve_format)

    residual = None if whole.residual is None else part(whole.residual)
    return Batch(part(whole.input), residual, part(whole.grad_output))


def activated(output: Tensor, case: Case) -> Tensor:
    """Apply the case's activation with torch."""
    return {None: output, "relu": F.relu(output), "relu6": F.relu6(output)}[case.activation]


@dataclass
class Expected:
    """The last step's output and gradients, and the running statistics after all steps."""

    output: Tensor
    grads: dict[str, Tensor]
    running_mean: Tensor
    running_var: Tensor


def expected(case: Case) -> Expected:
    """Compute the results with torch in float64, on the whole batch at once."""
    running_mean = torch.zeros(case.shape[0], dtype=torch.float64)
    running_var = torch.ones(case.shape[0], dtype=torch.float64)
    for step in range(case.steps):
        whole = whole_batch(case, step)
        names = ("input", "residual", "weight", "bias")
        given = (whole.input, whole.residual, *vectors(case))
        leaves = {
            name: tensor.double().requires_grad_()
            for name, tensor in zip(names, given, strict=True)
            if tensor is not None
        }
        output = F.batch_norm(
            leaves["input"],
            running_mean,
            running_var,
            leaves.get("weight"),
            leaves.get("bias"),
            training=True,
            momentum=1 / (step + 1) if case.momentum is None else case.momentum,
            eps=EPS,
        )
        if case.adds:
            output = output + leaves["residual"]
        output = activated(output, case)
        output.backward(whole.grad_output.double())
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Expected(output.detach(), grads, running_mean, running_var)
