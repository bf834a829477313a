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
    r"""Passes its input through, and adds the gradient of :math:`l_1 \sum |a| + \tfrac{l_2}{2} \sum a^2` in backward.

    .. math::

        \frac{\partial L}{\partial a} \leftarrow \frac{\partial L}{\partial a}
            + l_1 \operatorname{sign}(a) + l_2 \, a, \qquad \operatorname{sign}(0) = 0

    The gradients are those of ``loss + penalty``, also when they are differentiated again; the loss itself stays what
    it was. The penalty's gradient is added once for each forward, in the first backward through it, whatever the
    scale of the incoming gradient; compiled code and transforms of `torch.func` add it in each. With a
    ``GradScaler``, or a loss divided for accumulation, scale ``l1`` and ``l2`` alike. The sums run over all elements,
    those of the batch included: for a mean over the batch, divide ``l1`` and ``l2`` by its size.

    It acts in training mode alone, and where the input requires a gradient. Nothing is copied: what is kept for
    backward is the input itself, so the next layer must not overwrite it (``ReLU(inplace=True)`` is an error then).
    In half precision the gradient is computed in float32 and rounded once.

    Args:
        l1: weight of the sum of magnitudes, at least 0.
        l2: weight of half the sum of squares, at least 0.
        track_value: whether compiled code computes `value`, which costs it a sum over the input. Uncompiled
            code does so at no cost, whatever this says.

    Shape:
        any; the output is the input.

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
        """The input."""
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
        """The penalty of the last input that was penalised, 0-d float64 on its device, which is not waited for.

        Backward finds it on its way; before that it is computed when it is asked for. If that input is gone without
        a backward, that of the one before; None if there is none.
        """
        return None if self._latest is None else self._latest.penalty()

    def extra_repr(self) -> str:
        """The arguments."""
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
    """One input and its penalty, whichever of the two is at hand."""

    def __init__(self, value: Tensor | None) -> None:
        self.value = value
        self.is_added = False
        self._input: weakref.ref[Tensor] | None = None
        self._before: _Activations | None = None

    def watch(self, input: Tensor, l1: float, l2: float, before: _Activations | None) -> None:
        self._input, self._l1, self._l2 = weakref.ref(input), l1, l2
        self._version = input._version
        # Checkpointing runs the forward again, and backward through the first run.
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
    """Whether the kernels take these."""
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
    """Whether tensors stand for more than their memory."""
    return torch._C._are_functorch_transforms_active()


def _penalized(grad: Tensor, input: Tensor, l1: float, l2: float) -> Tensor:
    """Adds the penalty's gradient by torch's operations, which can be differentiated again and compiled."""
    wide = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
    result = grad.to(wide)
    if l1:
        result = result + l1 * input.sign().to(wide)
    if l2:
        result = result + l2 * input.to(wide)
    return result.to(grad.dtype)
