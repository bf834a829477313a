"""Passes batches forward and backward through a copy of a model, and measures losses, norms and gradients."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steadygrad.examination.curvature import graph_nodes
from steadygrad.examination.examination import Examination, ParameterGradient
from steadygrad.examination.recording import Recorder, tensors

LossOf = Callable[[nn.Module, Any], Tensor]
_MODEL_NAMES = ("model", "module", "net", "network")


def measure(
    model: nn.Module,
    loss_of: LossOf,
    batches: Iterable[Any],
    loss_scale: float,
    underflow: bool = False,
) -> tuple[Examination, list[Tensor]]:
    """Returns what passes over the batches show, and the mean square of each element of the gradients.

    ``.grad`` is not touched. The gradients of parameters are unscaled, those of layers are of the scaled loss.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    recorder = Recorder(model, underflow)
    losses: list[float] = []
    totals: list[float] = []
    norms: dict[str, list[float]] = {name: [] for name in trained}
    squares = [torch.zeros_like(p, dtype=torch.float32) for p in trained.values()]
    for batch in batches:
        with recorder.forward_pass():
            loss = loss_of(model, batch)
        losses.append(loss.item())
        totals.append(0.0)
        scaled = torch.autograd.grad(loss * loss_scale, [*trained.values()], allow_unused=True)
        for of_one, square, gradient in zip(norms.values(), squares, scaled, strict=True):
            if gradient is not None:
                gradient = gradient.to_dense().float() / loss_scale
                of_one.append(float(torch.linalg.vector_norm(gradient, dtype=torch.float64)))
                totals[-1] = math.hypot(totals[-1], of_one[-1])
                square += gradient.square()
    layers = list(recorder.layers.values())
    for before, after in itertools.pairwise(layers):
        after.gain = ratio(after.rms, before.rms)
        before.gradient_gain = ratio(before.gradient_norm, after.gradient_norm)
    rows = []
    for name, p in model.named_parameters():
        state = "" if norms.get(name) else "unused" if p.requires_grad else "frozen"
        own = torch.tensor(norms.get(name) or [math.nan], dtype=torch.float64)
        norm, deviation = float(own.mean()), float(own.std(correction=0))
        share, relative = ratio(norm, statistics.fmean(totals)), ratio(norm, norm_of([p]))
        rows.append(ParameterGradient(name, norm, share, relative, ratio(deviation, norm), state))
    found = Examination(layers, rows, list(recorder.units.values()), losses, totals)
    weighted = [layer for layer in layers if layer.has_weight]
    if weighted:
        first = layers[0] if layers[0].name == "input" else weighted[0]
        found.depth = len(weighted)
        found.factor = ratio(weighted[-1].rms, first.rms)
        found.gradient_factor = ratio(weighted[0].gradient_norm, weighted[-1].gradient_norm)
    return found, [square / len(losses) for square in squares]


def ratio(value: float, by: float) -> float:
    """Returns ``value / by``; NaN if ``by`` is 0."""
    return value / by if by else math.nan


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Returns the norm of all elements of tensors on any devices."""
    return math.hypot(*(float(t.detach().float().norm()) for t in tensors))


def copied(model: nn.Module) -> nn.Module:
    """Returns a copy of a model; detaches what a forward left on its modules, since graphs cannot be copied."""
    kept = [tensor for module in model.modules() for tensor in tensors(vars(module))]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept if not t.is_leaf})
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"examine: model: expected one that copy.deepcopy can copy, got the error {error}"
        ) from error


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


def measure_underflow(
    model: nn.Module, loss_of: LossOf, batch: Any, found: Examination, loss_scale: float
) -> None:
    """Measures on a copy in fp32 what layers in fp16 lose, since gradients in fp16 do not tell."""
    half = {
        (layer.name, layer.call): layer for layer in found.layers if layer.dtype == torch.float16
    }
    if not half:
        return
    device = next(model.parameters()).device.type
    if isinstance(batch, (tuple, list)):
        batch = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch]
    with torch.autocast(device, enabled=False):
        whole, _ = measure(copied(model).float(), loss_of, [batch], loss_scale, True)
    for layer in whole.layers:
        if (layer.name, layer.call) in half:
            half[layer.name, layer.call].lost = layer.lost


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{size}"
