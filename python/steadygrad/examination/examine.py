"""Defines the function :func:`steadygrad.examine`."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steadygrad.examination import curvature
from steadygrad.examination.examination import Examination
from steadygrad.examination.measuring import (
    copied,
    loss_form,
    measure,
    measure_underflow,
    norm_of,
)
from steadygrad.examination.trials import EDGE, try_remedies
from steadygrad.examination.verdicts import judge
from steadygrad.optim.stabilizer import Stabilizer

_BATCHES, _PRODUCTS = 16, 20
# A step should move the parameters by at most this share of their norm. Brock et al. 2021 clip there by output unit;
# the study's runs with it do as well as with their best fixed limit, or better (docs/examine.md).
_STEP_SHARE = 0.01
_QUANTILE = 0.9


def examine(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_scale: float = 1.0,
    sharpness: bool = True,
    remedies: bool = True,
    at: Literal["first_nonfinite"] | None = None,
) -> Examination:
    """Finds out why a network's training explodes, or will explode, and which remedy will keep it stable.

    The function passes up to 16 batches forward and backward through a copy of the model. The model itself and its
    ``.grad`` are not touched, and the states of random generators are restored, even after an exception or Ctrl-C.
    ``docs/examine.md`` says what is measured and how sure the verdicts are.

    Args:
        model: Network in the mode in which it is trained. ``DistributedDataParallel`` and ``torch.compile`` are looked
            through: the module inside runs eagerly, on this rank alone. ``torch.autocast`` around the call applies.
        loss_fn: Function of outputs and targets that returns a loss of one element; or of model and batch, if its first
            parameter is called ``model``, ``module``, ``net`` or ``network``.
        batches: Iterable of ``(inputs, targets)``, which are moved to the model's device, or of the batches that
            ``loss_fn(model, batch)`` takes. If it is an iterator, the batches that were examined are consumed.
        optimizer: Optimizer, stabilized or not, whose learning rate and state are judged. Default: None, plain gradient
            descent.
        loss_scale: Factor of the loss before backward, such as ``scaler.get_scale()``. Default: 1.
        sharpness: Whether to compute the largest eigenvalue of the Hessian, by at most 20 Hessian-vector products.
            Default: True.
        remedies: Whether to try remedies on copies of model and optimizer; this needs an optimizer. If something stands
            out, or the learning rate is above 0.3 of the largest stable one, the copies are first trained as they are
            for up to 128 steps. If that run is lost or something stands out, they are then trained with each remedy
            for 16 steps. Default: True.
        at: ``"first_nonfinite"`` examines only the first batch, of all, whose loss or gradient is not finite.
            Default: None.

    Returns:
        Numbers and verdicts. The largest stable learning rate is ``2 / sharpness`` for gradient descent, ``2 (1 + beta)
        / sharpness`` with momentum (Cohen et al. 2021) and ``2 (1 + beta1) / (1 - beta1) / sharpness`` for Adam, with
        the sharpness of the preconditioned Hessian (Cohen et al. 2022). Above that rate training leaves the place where
        it is (Gilmer et al. 2022).

    Raises:
        TypeError: An argument is of the wrong kind, or the loss does not have exactly one element.
        ValueError: There is no batch or no trainable parameter, a parameter is lazy or sharded, the loss has no graph,
            or the optimizer is for other parameters.
    """
    model, optimizer = _checked(model, batches, optimizer, at, loss_scale)
    loss_of = loss_form(loss_fn, [*model.parameters()])
    with _apart(batches):
        network = copied(model)
        # Without ``at`` all batches are measured together, with it one after the other until one is not finite.
        parts: Iterable[list[Any]] = ([batch] for batch in _counted(batches))
        if at is None:
            parts = [list(_counted(itertools.islice(batches, _BATCHES)))]
        for kept in parts:
            if not kept:
                raise ValueError("examine: batches: expected at least one, got none")
            found, squares = measure(network, loss_of, kept, loss_scale)
            numbers = zip(kept, found.losses, found.norms, strict=True)
            finite = [batch for batch, *pair in numbers if all(map(math.isfinite, pair))]
            if at is None or not finite:
                break
        else:
            raise ValueError(
                "examine: at: expected a batch whose loss or gradient is not finite, got none in batches; to learn "
                "why later steps explode, leave out at="
            )
        norms = [norm for norm in found.norms if math.isfinite(norm)]
        found.max_norm = _max_norm(model, optimizer, norms)
        if optimizer is not None:
            found.lr = float(optimizer.param_groups[0]["lr"])
        if not sharpness or not finite:
            why = "no batch has a finite loss and gradient" if sharpness else "sharpness=False"
            found.why_no_sharpness = why
        else:
            owned = [p for p in model.parameters() if p.requires_grad]
            try:
                found.sharpness, found.largest_stable_lr = curvature.sharpness(
                    network, loss_of, finite[0], optimizer, owned, squares, _PRODUCTS
                )
                if math.isnan(found.sharpness):
                    found.why_no_sharpness = "the gradient's own gradient is not finite"
            except RuntimeError as error:  # An operation has no second derivative.
                found.why_no_sharpness = str(error).partition("\n")[0]
        if finite:
            measure_underflow(network, loss_of, finite[0], found, loss_scale)
        found.verdicts = judge(found, model)
        near = not found.lr / found.largest_stable_lr <= EDGE  # or not known
        if (near or found.verdicts) and remedies and optimizer is not None and finite:
            try:
                found.trials = try_remedies(model, loss_of, finite, optimizer, found)
            except (RuntimeError, TypeError) as error:
                found.why_no_trials = str(error).partition("\n")[0]
            found.verdicts = judge(found, model)
    return found


@contextlib.contextmanager
def _apart(batches: object) -> Iterator[None]:
    """Enables gradients and runs eagerly in the context; restores the random generators at its end."""
    loader: Any = getattr(batches, "generator", None)
    drawn = loader.get_state() if isinstance(loader, torch.Generator) else None
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # If dynamo was never imported, nothing is compiled, and importing it would take seconds.
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    forked = torch.random.fork_rng(devices)
    try:
        with forked, torch.inference_mode(False), torch.enable_grad(), eager:
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if drawn is not None:
            loader.set_state(drawn)


def _max_norm(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, norms: list[float]
) -> float:
    """Returns the 0.9 quantile of the norms, or less: the limit at which steps of SGD are 1 % of the parameters."""
    limit = float(np.quantile(norms, _QUANTILE)) if norms else math.nan
    if isinstance(optimizer, torch.optim.SGD) and norms:
        group = optimizer.param_groups[0]
        size = norm_of(p for p in model.parameters() if p.requires_grad)
        step = float(group["lr"]) / (1 - float(group["momentum"]))
        limit = min(limit, _STEP_SHARE * size / step) if step and size else limit
    return limit


def _inside(model: nn.Module) -> nn.Module:
    """Returns the module inside of DistributedDataParallel, DataParallel and torch.compile."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        inside: Any = model.module if isinstance(model, parallel) else model._orig_mod
        model = inside
    return model


def _checked(
    model: Any, batches: object, optimizer: Any, at: object, loss_scale: float
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Returns the network inside of model, and the optimizer inside of a Stabilizer."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"examine: model: expected a torch.nn.Module, got {type(model).__name__}")
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        kind = type(batches).__name__
        raise TypeError(f"examine: batches: expected an iterable of (inputs, targets), got {kind}")
    model = _inside(model)
    for name, p in model.named_parameters():
        wrong = "sharded: examine before fully_shard" if hasattr(p, "device_mesh") else ""
        wrong = "lazy: call the model once" if is_lazy(p) else wrong
        if wrong:
            raise ValueError(f"examine: model: expected whole parameters, but {name} is {wrong}")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise ValueError("examine: model: expected a parameter that requires a gradient, got none")
    if isinstance(optimizer, Stabilizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, (torch.optim.Optimizer, type(None))):
        kind = type(optimizer).__name__
        raise TypeError(f"examine: optimizer: expected a torch.optim.Optimizer or None, got {kind}")
    groups = [] if optimizer is None else optimizer.param_groups
    if groups and not any(id(p) in trained for group in groups for p in group["params"]):
        raise ValueError("examine: optimizer: expected one for the model's parameters, got another")
    if at not in (None, "first_nonfinite"):
        raise ValueError(f"examine: at: expected 'first_nonfinite' or None, got {at!r}")
    if not 0 < loss_scale < math.inf:
        raise ValueError(f"examine: loss_scale: expected a number above 0, got {loss_scale!r}")
    return model, optimizer


def _counted(batches: Iterable[Any]) -> Iterator[Any]:
    """Yields the batches, and counts them on stderr if that is a terminal."""
    shown = sys.stderr.isatty()
    for number, batch in enumerate(batches, 1):
        if shown:
            sys.stderr.write(f"\rexamine: batch {number}")
        yield batch
    if shown:
        sys.stderr.write("\r\033[K")
