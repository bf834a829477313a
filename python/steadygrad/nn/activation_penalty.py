"""A layer that penalises the activations that pass through it."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from steadygrad import _kernels
from steadygrad.clip import as_number, device_of
from steadygrad.composite import has_kernels
from steadygrad.memory import allocator

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ActivationPenalty(nn.Module):
    r"""Returns its input, and adds the gradient of :math:`l_1 \sum |a| + \tfrac{l_2}{2} \sum a^2` in the backward pass.

    .. math::

        \frac{\partial L}{\partial a} \leftarrow \frac{\partial L}{\partial a}
            + l_1 \operatorname{sign}(a) + l_2 \, a, \qquad \operatorname{sign}(0) = 0

    The gradients are those of ``loss + penalty``, also if they are differentiated again, but the loss itself does not
    change. The penalty's gradient is added once for each forward pass, in the first backward pass through it, and is
    not scaled by the incoming gradient. Compiled code and transforms of `torch.func` add it in every backward pass.
    With a ``GradScaler``, or with a loss that is divided for accumulation, scale ``l1`` and ``l2`` in the same way. The
    sums run over all elements, including the batch dimension: for a mean over the batch, divide ``l1`` and ``l2`` by
    the batch size.

    The layer acts only in training mode, and only if the input requires a gradient. It copies nothing: the backward
    pass needs the input itself, so the next layer must not overwrite it (``ReLU(inplace=True)`` is an error then). In
    half precision the gradient is computed in float32 and rounded once.

    Args:
        l1: Weight of the sum of magnitudes, at least 0. Default: 0.
        l2: Weight of half the sum of squares, at least 0. Default: 0.
        track_value: Whether compiled code computes `value`, for which it needs one more sum over the input. Code that
            is not compiled always computes it, at no cost. Default: True.

    Shape:
        Any shape; the output is the input.

    Raises:
        TypeError: ``l1`` or ``l2`` is not a number.
        ValueError: ``l1`` or ``l2`` is negative or NaN.

    Source: Merity et al. 2017, Revisiting Activation Regularization for Language RNNs.
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0, *, track_value: bool = True) -> None:
        super().__init__()
        self.l1 = _weight("l1", l1)
        self.l2 = _weight("l2", l2)
        self.track_value = track_value
        self._latest: _Activations | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Returns the input, and records that its penalty is to be added in the backward pass."""
        if not self.training or not (self.l1 or self.l2):
            return input
        if not (torch.is_grad_enabled() and input.requires_grad):
            return input
        latest = None
        if torch.compiler.is_compiling():
            if self.track_value:
                self._latest = _Activations(_penalty(input.detach(), self.l1, self.l2))
        elif type(input) in (Tensor, nn.Parameter) and not _is_transformed():
            latest = _Activations(None)
            latest.watch(input, self.l1, self.l2, self._latest)
            self._latest = latest
        penalize: Any = _Penalize.apply
        output: Tensor = penalize(input, self.l1, self.l2, latest)
        return output

    @property
    def value(self) -> Tensor | None:
        """Returns the penalty of the last penalised input, 0-d float64 on its device, without waiting for the device.

        The backward pass computes it along the way; before that, reading this property computes it. If that input no
        longer exists and there was no backward pass, it is the penalty of the input before. None if there is none.
        """
        return None if self._latest is None else self._latest.penalty()

    def extra_repr(self) -> str:
        """Returns the arguments as text."""
        return f"l1={self.l1:g}, l2={self.l2:g}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}


def _weight(name: str, value: float) -> float:
    number = as_number("ActivationPenalty", name, value)
    if math.isnan(number) or number < 0:
        raise ValueError(
            f"ActivationPenalty: {name}: expected a number that is at least 0, got {value}"
        )
    return number


class _Activations:
    """Holds the penalty of one input, or a reference to the input from which it can be computed."""

    def __init__(self, value: Tensor | None) -> None:
        self.value = value
        self.is_added = False
        self._input: weakref.ref[Tensor] | None = None
        self._before: _Activations | None = None

    def watch(self, input: Tensor, l1: float, l2: float, before: _Activations | None) -> None:
        self._input, self._l1, self._l2 = weakref.ref(input), l1, l2
        self._version = input._version
        # Checkpointing runs the forward pass twice, and the backward pass goes through the first run.
        self._before = before
        if before is not None:
            before._before = None

    def penalty(self) -> Tensor | None:
        if self.value is None and self._input is not None:
            input = self._input()
            if input is not None and input._version == self._version:
                self.value = _penalty(input.detach(), self._l1, self._l2)
        if self.value is None and self._before is not None:
            return self._before.value
        return self.value


def _penalty(input: Tensor, l1: float, l2: float) -> Tensor:
    wide = torch.float32 if input.device.type == "mps" else torch.float64
    value = torch.zeros((), dtype=wide, device=input.device)
    if l1:
        value = value + l1 * torch.linalg.vector_norm(input, 1, dtype=wide)
    if l2:
        value = value + l2 / 2 * torch.linalg.vector_norm(input, 2, dtype=wide).square()
    return value


class _Penalize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, l1: float, l2: float, latest: _Activations | None) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.l1, ctx.l2, ctx.latest = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (input,) = ctx.saved_tensors
        latest: _Activations | None = ctx.latest
        if latest is not None:
            if latest.is_added:
                return grad_output, None, None, None
            latest.is_added = True
        if latest is None or torch.is_grad_enabled() or not _fits(input, grad_output):
            return _penalized(grad_output, input, ctx.l1, ctx.l2), None, None, None
        grad = grad_output.clone().resolve_neg()
        device = device_of([input])
        there = None if device is None else torch.empty((), dtype=torch.float64, device=device)
        value = _kernels.add_penalty_(
            [input.detach()], [grad], ctx.l1, ctx.l2, there, allocator(device)
        )
        if latest.value is None:
            known = torch.tensor(value, dtype=torch.float64) if there is None else there
            latest.value = known
        return grad, None, None, None


def _fits(input: Tensor, grad_output: Tensor) -> bool:
    """Returns whether the kernels take these tensors."""
    return (
        type(input) in (Tensor, nn.Parameter)
        and type(grad_output) is Tensor
        and input.dtype == grad_output.dtype
        and input.dtype in _DTYPES
        and input.layout == grad_output.layout == torch.strided
        and has_kernels(input.device)
        and not _is_transformed()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _is_transformed() -> bool:
    """Returns whether a transform of torch.func is active, so that a tensor may stand for more than its memory."""
    return torch._C._are_functorch_transforms_active()


def _penalized(grad: Tensor, input: Tensor, l1: float, l2: float) -> Tensor:
    """Adds the penalty's gradient with torch's operations, which can be differentiated again and compiled."""
    wide = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
    result = grad.to(wide)
    if l1:
        result = result + l1 * input.sign().to(wide)
    if l2:
        result = result + l2 * input.to(wide)
    return result.to(grad.dtype)
