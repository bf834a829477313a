"""Forward and backward passes over batches, and the numbers that they yield."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steadygrad.examination.curvature import largest_eigenvalue, step_scale
from steadygrad.examination.recording import Recorder

LossOf = Callable[[nn.Module, Any], Tensor]
_MODEL_NAMES = ("model", "module", "net", "network")


class Measurement:
    """Losses, norms and gradients of passes over batches; the lists have one entry per batch.

    ``gradients`` maps the name of a parameter to its norms, and has no entry for an unused one; ``squares`` holds the
    mean square of each element. Both are unscaled and never touch ``.grad``; those in ``recorder`` are of the scaled
    loss.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: LossOf,
        batches: Iterable[Any],
        loss_scale: float = 1.0,
        in_fp16: bool = False,
    ) -> None:
        parameters = trainable(model)
        self.recorder = Recorder(model, in_fp16)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, list[float]] = {name: [] for name in parameters}
        self.squares = [torch.zeros_like(p, dtype=torch.float32) for p in parameters.values()]
        with self.recorder.hooked():
            for batch in batches:
                with self.recorder.forward_pass():
                    loss = loss_of(model, batch)
                found = torch.autograd.grad(
                    loss * loss_scale, list(parameters.values()), allow_unused=True
                )
                self.recorder.end_batch()
                self.losses.append(loss.item())
                self._add([None if g is None else g.to_dense().float() / loss_scale for g in found])
        for square in self.squares:
            square /= max(len(self.losses), 1)

    def _add(self, gradients: list[Tensor | None]) -> None:
        total = 0.0
        for norms, square, gradient in zip(
            self.gradients.values(), self.squares, gradients, strict=True
        ):
            if gradient is not None:
                norms.append(float(torch.linalg.vector_norm(gradient, dtype=torch.float64)))
                total = math.hypot(total, norms[-1])
                square += gradient.square()
        self.norms.append(total)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_form(loss_fn: Any) -> LossOf:
    """Returns the loss as a checked function of model and batch; :func:`steadygrad.examine` documents its forms."""
    if not callable(loss_fn):
        raise TypeError(f"examine: loss_fn: expected a function, got {_shown(loss_fn)}")
    takes_model = False
    if not isinstance(loss_fn, nn.Module):
        with contextlib.suppress(TypeError, ValueError):  # Functions in C have no signature.
            first = next(iter(inspect.signature(loss_fn).parameters.values()), None)
            takes_model = first is not None and first.name in _MODEL_NAMES

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        if takes_model:
            loss = loss_fn(model, batch)
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            device = next(model.parameters()).device
            inputs, targets = (x.to(device) if isinstance(x, Tensor) else x for x in batch)
            loss = loss_fn(model(inputs), targets)
        else:
            raise TypeError(
                f"examine: batches: expected an iterable of (inputs, targets), got {_shown(batch)} "
                "in it; for one batch write [(inputs, targets)], for batches of another form "
                "loss_fn=lambda model, batch: ..."
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"examine: loss_fn: expected a loss of one element, got {_shown(loss)}")
        if not loss.requires_grad:
            raise ValueError(
                "examine: loss_fn: expected a loss that depends on the parameters, got one without "
                "a graph; look for detach(), no_grad() or item() in the network"
            )
        return loss.reshape(())

    return loss_of


def sharpness_of(
    model: nn.Module,
    loss_of: LossOf,
    batch: Any,
    optimizer: torch.optim.Optimizer | None,
    squares: Sequence[Tensor],
    products: int,
) -> float:
    """Returns the largest eigenvalue of the Hessian on a batch, preconditioned as the optimizer does."""
    parameters = list(trainable(model).values())
    scale = step_scale(optimizer, parameters, squares)
    # Fused attention and cuDNN's recurrent layers have no second derivatives; the operations that they replace have.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    without = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), without:
        return largest_eigenvalue(loss_of(model, batch), parameters, scale, products)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{size}"
