"""Calls of the batch norm kernels on random numbers, and the results of their definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steadygrad import _kernels
from steadygrad.memory import allocator
from steadygrad.nn.relu_mask import mask_size
from steadygrad.reference import batch_norm as reference
from steadygrad.reference.batch_norm import CEILINGS, Activation, Statistics
from tests.tolerances import assert_rounded, float64

Array = NDArray[np.float64]
Shape = tuple[int, ...]
LAYOUTS = ["first", "last"]
FUSIONS: dict[str, tuple[Activation | None, bool]] = {
    "bn": (None, False),
    "relu": ("relu", False),
    "relu6": ("relu6", False),
    "add": (None, True),
    "add+relu": ("relu", True),
    "add+relu6": ("relu6", True),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GUARD = 24  # number of elements on each side of a tensor that kernels must not write
# What is written is surrounded by this number, in every dtype; what is read is surrounded by NaN, which would show.
UNWRITTEN = 77.0


def place(
    values: Array | None,
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "first",
    offset: int = 0,
    surroundings: float = math.nan,
) -> Tensor | None:
    """Return a dense tensor with these values and this layout, in the middle of a larger storage."""
    if values is None:
        return None
    last = layout == "last" and values.ndim > 1
    moved = np.moveaxis(values, 1, -1) if last else values
    if dtype == torch.uint8:
        surroundings = UNWRITTEN
    flat = torch.full((values.size + 2 * GUARD + offset,), surroundings, dtype=dtype, device=device)
    start = GUARD + offset
    flat[start : start + values.size] = torch.tensor(moved.ravel()).to(dtype).to(device)
    tensor = flat[start : start + values.size].view(moved.shape)
    return tensor.movedim(-1, 1) if last else tensor


def assert_surroundings_unwritten(*tensors: Tensor | None) -> None:
    """Check that the surroundings of tensors of :func:`place` are as they were."""
    for tensor in tensors:
        if tensor is None or tensor.numel() == 0:
            continue
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = tensor.as_strided((size,), (1,), 0)
        start = tensor.storage_offset()
        around = torch.cat([flat[:start], flat[start + tensor.numel() :]])
        assert (around == UNWRITTEN).all(), "a kernel wrote outside of a tensor"


@dataclass
class Case:
    """The operands and options of a call. ``weight`` and ``bias`` are dtypes, or None where absent."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype = torch.float32
    layout: str = "first"
    fusion: str = "bn"
    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    eps: float = 1e-5
    offset: int = 0
    mean: float = 0.0
    seed: int = 0
    values: dict[str, Array | None] = field(default_factory=dict)
    tensors: dict[str, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        x, added, grad = rng.normal(size=(3, *self.shape))
        scale, shift = rng.normal(size=(2, self.channels))
        # Scales keep away from 0, or ReLU would cut everything or nothing.
        scale += np.copysign(0.5, scale)
        if self.activation == "relu6":
            scale, added = 4 * scale, 4 * added  # so that some elements reach the ceiling
        self.put("input", x + self.mean)
        self.put("residual", added if self.added else None)
        self.put("grad_output", grad)
        self.put("weight", scale if self.weight else None, self.weight)
        self.put("bias", shift if self.bias else None, self.bias)

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def activation(self) -> Activation | None:
        return FUSIONS[self.fusion][0]

    @property
    def ceiling(self) -> float | None:
        return CEILINGS[self.activation]

    @property
    def added(self) -> bool:
        return FUSIONS[self.fusion][1]

    def put(self, name: str, values: Array | None, dtype: torch.dtype | None = None) -> None:
        """Set an argument to these values, rounded to the dtype."""
        tensor = place(values, dtype or self.dtype, self.device, self.layout, self.offset)
        self.tensors[name] = tensor
        self.values[name] = None if tensor is None else float64(tensor).copy()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def array(self, name: str) -> Array:
        """Return the values of an argument that is not None."""
        values = self.values[name]
        assert values is not None
        return values

    def empty(self) -> Tensor:
        """Return memory for an output, filled with a number that no kernel may leave there."""
        values = np.full(self.shape, UNWRITTEN)
        tensor = place(values, self.dtype, self.device, self.layout, self.offset, UNWRITTEN)
        assert tensor is not None
        return tensor

    def vector(self, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return memory for ``size`` numbers."""
        tensor = place(np.full(size, UNWRITTEN), dtype, self.device, surroundings=UNWRITTEN)
        assert tensor is not None
        return tensor

    def mask(self) -> Tensor | None:
        """Return memory for the mask, or None if no mask is needed."""
        if self.ceiling is None or not self.added:
            return None
        return self.vector(mask_size(self["input"]), torch.uint8)

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.tensors["weight"], self.tensors["bias"]

    @property
    def allocate(self) -> Any:
        return allocator(self.device)

    def keep_off_the_kink(self, statistics: Statistics) -> None:
        """Set gradients to 0 where rounding decides on which side of a bound of ReLU an element is."""
        if self.ceiling is not None:
            at_a_bound = self.distance_from_bounds(statistics) < 1e-3
            self.put("grad_output", np.where(at_a_bound, 0.0, self.array("grad_output")))

    def distance_from_bounds(self, statistics: Statistics) -> Array:
        """Return how far each element before the activation is from 0 and from the ceiling, whichever is nearer."""
        assert self.ceiling is not None
        before = reference.batch_norm(*self.defined(statistics))
        return np.minimum(np.abs(before), np.abs(before - self.ceiling))

    def defined(self, statistics: Statistics) -> tuple[Any, ...]:
        """Return the arguments of the definition, without the activation."""
        values = (self.values[name] for name in ("input", "weight", "bias", "residual"))
        x, weight, bias, residual = values
        return x, statistics, weight, bias, self.eps, residual

    # --- the kernels ---

    def forward(
        self,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        batches: Tensor | None = None,
        momentum: float | None = 0.1,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return output, mask and statistics of ``batch_norm_forward``."""
        output, mask = self.empty(), self.mask()
        statistics = self.vector(2 * self.channels + 1)
        _kernels.batch_norm_forward(
            self["input"],
            self.tensors["residual"],
            *self.affine,
            running_mean,
            running_var,
            batches,
            momentum,
            self.eps,
            self.ceiling,
            output,
            mask,
            statistics,
            self.allocate,
        )
        assert_surroundings_unwritten(output, mask, statistics)
        return output, mask, statistics

    def statistics(self) -> Tensor:
        """Return the results of ``batch_norm_statistics``."""
        statistics = self.vector(2 * self.channels + 1)
        _kernels.batch_norm_statistics(self["input"], statistics, self.allocate)
        assert_surroundings_unwritten(statistics)
        return statistics

    def normalize(
        self,
        statistics: Tensor | None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and mask of ``batch_norm_normalize``."""
        output, mask = self.empty(), self.mask()
        _kernels.batch_norm_normalize(
            self["input"],
            self.tensors["residual"],
            *self.affine,
            statistics,
            running_mean,
            running_var,
            self.eps,
            self.ceiling,
            output,
            mask,
        )
        assert_surroundings_unwritten(output, mask)
        return output, mask

    def backward(
        self,
        mask: Tensor | None,
        statistics: Tensor | None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return all gradients of the case, from ``batch_norm_backward``."""
        grads = self.gradients()
        _kernels.batch_norm_backward(
            self["grad_output"],
            self["input"],
            mask,
            *self.affine,
            statistics,
            running_mean,
            running_var,
            self.eps,
            self.ceiling,
            grads["input"],
            grads.get("residual"),
            grads.get("weight"),
            grads.get("bias"),
            self.allocate,
        )
        assert_surroundings_unwritten(*grads.values())
        return grads

    def passed(self, mask: Tensor) -> NDArray[np.bool_]:
        """Return where a mask lets gradients through, by asking the kernels, which alone know the order of its bits."""
        ones = place(np.ones(self.shape), self.dtype, self.device, self.layout, self.offset)
        grad, zeros = self.empty(), torch.zeros(self.channels, device=self.device)
        _kernels.batch_norm_backward(
            ones,
            self["input"],
            mask,
            *(None, None, None, zeros, zeros),
            1.0,
            math.inf,
            *(None, grad, None, None),
            self.allocate,
        )
        assert_surroundings_unwritten(grad)
        values = float64(grad)
        np.testing.assert_array_equal(values, values != 0)
        return values != 0

    def backward_sums(self, mask: Tensor | None, statistics: Tensor) -> Tensor:
        """Return the results of ``batch_norm_backward_sums``."""
        sums = self.vector(2 * self.channels)
        _kernels.batch_norm_backward_sums(
            self["grad_output"],
            self["input"],
            mask,
            *self.affine,
            statistics,
            self.eps,
            self.ceiling,
            sums,
            self.allocate,
        )
        assert_surroundings_unwritten(sums)
        return sums

    def backward_input(
        self, mask: Tensor | None, statistics: Tensor, sums: Tensor
    ) -> dict[str, Tensor]:
        """Return the gradients of input and residual, from ``batch_norm_backward_input``."""
        grads = self.gradients()
        _kernels.batch_norm_backward_input(
            self["grad_output"],
            self["input"],
            mask,
            *self.affine,
            statistics,
            sums,
            self.eps,
            self.ceiling,
            grads["input"],
            grads.get("residual"),
        )
        assert_surroundings_unwritten(*grads.values())
        return {name: grads[name] for name in ("input", "residual") if name in grads}

    def gradients(self) -> dict[str, Tensor]:
        """Return memory for the gradients; without ReLU no kernel writes the residual's, which is the output's."""
        grads = {"input": self.empty()}
        if self.ceiling is not None and self.added:
            grads["residual"] = self.empty()
        for name, dtype in (("weight", self.weight), ("bias", self.bias)):
            if dtype is not None:
                grads[name] = self.vector(self.channels, dtype)
        return grads

    # --- the expected results ---

    def running(
        self, dtype: torch.dtype = torch.float32, seed: int = 1
    ) -> tuple[Tensor, Tensor, Statistics]:
        """Return running mean and variance, near the batch's, and their values."""
        rng = np.random.default_rng(seed)
        mean = place(self.mean + rng.normal(size=self.channels), dtype, self.device)
        var = place(rng.uniform(0.2, 3.0, size=self.channels), dtype, self.device)
        assert mean is not None and var is not None
        return mean, var, Statistics(float64(mean), float64(var), 0)

    def batch_statistics(self) -> Statistics:
        return reference.channel_statistics(self.array("input"))

    def assert_output(self, output: Tensor, statistics: Statistics) -> None:
        arguments: Any = (*self.defined(statistics), self.activation)
        want = reference.batch_norm(*arguments)
        assert_rounded(output, want, self._sizes(statistics), self.dtype)

    def assert_mask(self, mask: Tensor | None, output: Tensor, statistics: Statistics) -> None:
        """Check on which side of ReLU's bounds the mask puts each element; ``output`` agrees where rounding decides."""
        if mask is not None:
            assert self.ceiling is not None
            before = reference.batch_norm(*self.defined(statistics))
            clear = self.distance_from_bounds(statistics) > 1e-3
            got, after = self.passed(mask), float64(output)
            between = (before > 0) & (before < self.ceiling)
            np.testing.assert_array_equal(got[clear], between[clear])
            np.testing.assert_array_equal(got | (after == 0) | (after == self.ceiling), True)

    def assert_gradients(
        self, grads: dict[str, Tensor], statistics: Statistics, constant: bool = False
    ) -> None:
        arguments: Any = (*self.defined(statistics), self.activation, constant)
        want = reference.batch_norm_backward(self.array("grad_output"), *arguments)
        sizes = self._gradient_sizes(statistics, want.residual, constant)
        for name, grad in grads.items():
            assert_rounded(grad, getattr(want, name), sizes[name], self.dtype)

    def _along(self, vector: Any) -> Array:
        return np.reshape(vector, (1, -1) + (1,) * (len(self.shape) - 2))

    def _x_hat(self, statistics: Statistics) -> Array:
        return reference.batch_norm(self.array("input"), statistics, eps=self.eps)

    def _sizes(self, statistics: Statistics) -> Array:
        """Return the magnitudes that add up to an element of the output; a deviation counts, too."""
        v = self.values
        weight = 1.0 if v["weight"] is None else self._along(np.abs(v["weight"]))
        sizes = (np.abs(self._x_hat(statistics)) + 1) * weight
        for name in ("bias", "residual"):
            values = v[name]
            if values is not None:
                sizes = sizes + (self._along(np.abs(values)) if name == "bias" else np.abs(values))
        return sizes

    def _gradient_sizes(
        self, statistics: Statistics, passed: Array, constant: bool
    ) -> dict[str, Array]:
        axes = tuple(axis for axis in range(len(self.shape)) if axis != 1)
        weight = self.values["weight"]
        scale = (1 if weight is None else np.abs(weight)) / np.sqrt(statistics.var + self.eps)
        x_hat, grad = np.abs(self._x_hat(statistics)) + 1, np.abs(passed)
        products = grad * x_hat
        own = grad
        if not constant:
            own = own + self._along(grad.mean(axes)) + x_hat * self._along(products.mean(axes))
        return {
            "input": own * self._along(scale),
            "residual": grad,
            "weight": products.sum(axes),
            "bias": grad.sum(axes),
        }
