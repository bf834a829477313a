"""Parameters and gradients of every shape and layout that a model can give to an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

Draw = Callable[..., Tensor]


def _draw(seed: int, dtype: torch.dtype, device: torch.device | str) -> Draw:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).to(device)

    return draw


def mixed_parameters(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> list[Parameter]:
    """Return 0-d, empty, odd-sized, channels-last, transposed and strided parameters."""
    draw = _draw(seed, dtype, device)
    tensors = [
        draw(),
        draw(0),
        draw(3, 0, 2),
        draw(1),
        draw(31),
        draw(4, 8),
        draw(33),
        draw(2, 5, 3, 3),
        draw(3, 4, 2, 5).contiguous(memory_format=torch.channels_last),
        draw(2, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d),
        draw(7, 5).t(),
        draw(2, 3, 4).permute(2, 0, 1),
        draw(22)[::2],
        draw(6, 9)[:, 2:7],
        draw(5, 6, 4)[1:4, ::2],
        draw(400)[3:390],
    ]
    return [Parameter(tensor) for tensor in tensors]


def dense_parameters(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> list[Parameter]:
    """Return parameters whose gradients can have the same dense layout."""
    draw = _draw(seed, dtype, device)
    tensors = [
        draw(),
        draw(17),
        draw(5, 7),
        draw(3, 4, 2, 5).contiguous(memory_format=torch.channels_last),
        draw(130),
    ]
    return [Parameter(tensor) for tensor in tensors]


def like_layout(values: Tensor, layout: int) -> Tensor:
    """Return the values in another memory layout, 0 to 4, with strides that torch can produce."""
    if values.dim() == 0 or layout == 0:
        return values.clone(memory_format=torch.contiguous_format)
    if layout == 1:
        # The offset in a flat buffer is odd, as for a bucketed gradient: only elements are aligned.
        flat = values.new_empty(values.numel() + 1)
        view = flat[1:].view(values.shape)
        return view.copy_(values)
    if layout == 2:
        reverse = list(range(values.dim()))[::-1]
        return values.permute(reverse).contiguous().permute(reverse)
    if layout == 3:
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), 7.0)
        view = wide[..., 1::2]
        return view.copy_(values)
    if values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values.clone(memory_format=torch.contiguous_format)


def gradient_sequence(
    params: Sequence[Tensor], steps: int, seed: int = 0, decades: float = 6.0
) -> list[list[Tensor | None]]:
    """Return gradients for each step; their norm varies by ``10**decades``, and one in seven is None.

    Their strides differ from the parameter's as often as not.
    """
    generator = torch.Generator().manual_seed(seed)
    sequence: list[list[Tensor | None]] = []
    for step in range(steps):
        # The first two steps have the ends of the range, so that it is covered whatever is drawn.
        place = {0: 0.0, 1: 1.0}.get(step, float(torch.rand((), generator=generator)))
        scale = 10.0 ** (decades * (place - 0.5))
        gradients: list[Tensor | None] = []
        for index, param in enumerate(params):
            if step > 1 and (step * 5 + index) % 7 == 0:
                gradients.append(None)
                continue
            values = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
            layout = int(torch.randint(5, (), generator=generator))
            gradients.append(like_layout(values.to(param.dtype).to(param.device), layout))
        sequence.append(gradients)
    return sequence


def assign(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Set the gradients themselves, so that writing to them changes the sequence."""
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


def assign_copies(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Set copies of the gradients, in a layout that allows writing."""
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = None if gradient is None else gradient.clone()


def with_gradients(tensors: Sequence[Tensor]) -> list[Parameter]:
    """Return parameters whose gradients are the given tensors (not copies of them)."""
    params = []
    for tensor in tensors:
        # Set through .data, so that an expanded or sliced gradient keeps its strides.
        param = Parameter(torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device))
        param.grad = tensor
        params.append(param)
    return params


def values_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous, detached copies."""
    return [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
