"""Passes batches forward and backward, and measures losses, norms and gradients."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steadygrad.examination.curvature import graph_nodes, largest_eigenvalue
from steadygrad.examination.recording import Recorder

LossOf = Callable[[nn.Module, Any], Tensor]
_MODEL_NAMES = ("model", "module", "net", "network")


class Measurement:
    """Holds losses, norms and gradients of passes over batches; the lists have one entry per batch.

    ``gradients`` maps the name of a parameter to its norms, and has no entry for an unused one; ``squares`` holds the
    mean square of each element. Both are unscaled and never touch ``.grad``; those in ``recorder`` are of the scaled
    loss.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: LossOf,
        batches: Iterable[Any],
        loss_scale: float,
        in_fp16: bool = False,
    ) -> None:
        parameters = trainable(model)
        self.recorder = Recorder(model, in_fp16)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, list[float]] = {name: [] for name in parameters}
        self.squares = [torch.zeros_like(p, dtype=torch.float32) for p in parameters.values()]
        for batch in batches:
            with self.recorder.forward_pass():
                loss = loss_of(model, batch)
            found = torch.autograd.grad(
                loss * loss_scale, list(parameters.values()), allow_unused=True
            )
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


def copied(model: nn.Module) -> nn.Module:
    """Returns a copy of a model; detaches what a forward left on its modules, since graphs cannot be copied."""
    kept = [tensor for module in model.modules() for tensor in _tensors(vars(module))]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept if not t.is_leaf})
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"examine: model: expected one that copy.deepcopy can copy, got the error {error}"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def loss_form(loss_fn: Any, originals: Collection[nn.Parameter]) -> LossOf:
    """Returns the loss as a checked function of model and batch; :func:`steadygrad.examine` documents its forms.

    A loss that depends on one of the ``originals`` is refused, since losses are taken of copies of the model.
    """
    if not callable(loss_fn):
        raise TypeError(f"examine: loss_fn: expected a function, got {_shown(loss_fn)}")
    takes_model = False
    if not isinstance(loss_fn, nn.Module):
        with contextlib.suppress(TypeError, ValueError):  # Functions in C have no signature.
            first = next(iter(inspect.signature(loss_fn).parameters.values()), None)
            takes_model = first is not None and first.name in _MODEL_NAMES
    outside = set(map(id, originals))
    checked = False

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        nonlocal checked
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
        nodes = () if checked else graph_nodes([loss])
        checked = True
        if any(id(getattr(node, "variable", None)) in outside for node in nodes):
            raise ValueError(
                "examine: loss_fn: expected a loss of the model that it is given, which is a copy, "
                "got one that uses the original: write loss_fn=lambda model, batch: ... and take "
                "parameters from that model"
            )
        return loss.reshape(())

    return loss_of


def sharpness_of(
    model: nn.Module, loss_of: LossOf, batch: Any, scale: Tensor | None, products: int
) -> float:
    """Returns the largest eigenvalue of the Hessian on a batch, preconditioned by the diagonal ``scale``."""
    # Fused attention and cuDNN's recurrent layers have no second derivatives; the plain versions have.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    without = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), without:
        parameters = list(trainable(model).values())
        return largest_eigenvalue(loss_of(model, batch), parameters, scale, products)


def lost_to_fp16(
    model: nn.Module, loss_of: LossOf, batch: Any, measured: Measurement, loss_scale: float
) -> dict[str, float]:
    """Returns the share of the gradient that fp16 loses, by layer, measured on a copy in fp32."""
    layers = measured.recorder.layers
    half = [key for key, layer in layers.items() if layer.dtype == torch.float16]
    if not half:
        return {}
    device = next(model.parameters()).device.type
    if isinstance(batch, (tuple, list)):
        batch = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch]
    with torch.autocast(device, enabled=False):
        whole = Measurement(copied(model).float(), loss_of, [batch], loss_scale, True)
    found = {key[0]: whole.recorder.layers.get(key) for key in half}
    rows = {name: layer.gradients for name, layer in found.items() if layer and layer.gradients}
    return {name: gradients[0].lost for name, gradients in rows.items()}


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{size}"
