"""Computes the largest eigenvalue of the loss's Hessian, and the learning rate that it allows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# The iteration ends once the error bound is below this share of the eigenvalue.
_TOLERANCE = 0.01


def sharpness(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    optimizer: torch.optim.Optimizer | None,
    owned: Sequence[Tensor],
    squares: Sequence[Tensor],
    products: int,
) -> tuple[float, float]:
    """Returns the largest eigenvalue of the Hessian on a batch, and the largest stable learning rate.

    The Hessian is preconditioned as by the optimizer, plain gradient descent if that is None. ``owned`` are the
    parameters that the optimizer knows, of which the model may have copies. ``squares`` are mean squares of their
    gradients; they replace state that Adam and RMSprop do not have yet. At most ``products`` Hessian-vector products
    are taken. Raises RuntimeError if an operation has no second derivative.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Fused attention and cuDNN's recurrent layers have no second derivatives; the plain versions have.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    without = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    scale = None if optimizer is None else _step_scale(optimizer, owned, squares)
    with sdpa_kernel(SDPBackend.MATH), without:
        value = _largest_eigenvalue(loss_of(model, batch), parameters, scale, products)
    return value, math.inf if value <= 0 else _stable_product(optimizer) / value


def _largest_eigenvalue(
    loss: Tensor, parameters: Sequence[Tensor], scale: Tensor | None, products: int
) -> float:
    """Returns the largest eigenvalue of ``S H S``, H the Hessian of a loss and S a diagonal matrix.

    Lanczos iteration: each step takes one Hessian-vector product by double backward, as a power iteration does, but
    converges in fewer steps. It ends early once the residual, which bounds the error, is below 1 % (Golub and Van Loan,
    Matrix Computations, section 10.1). Negative eigenvalues are ignored: the loss falls along them at any rate.

    ``scale`` is the diagonal of S, ``(n,)`` for n elements of parameters, None for the identity.
    """
    device = parameters[0].device
    found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    slopes = {place: s for place, s in enumerate(found) if s is not None and s.requires_grad}
    if not slopes:
        return 0.0
    # Autograd would leave out functions marked ``once_differentiable`` without an error.
    if any(node.name().endswith("::Error") for node in graph_nodes(slopes.values())):
        raise RuntimeError("a function of the network is marked as once_differentiable")
    sizes = [p.numel() for p in parameters]

    def multiply(vector: Tensor) -> Tensor:
        parts = (vector if scale is None else vector * scale).split(sizes)
        directions = [parts[place].view_as(slope).to(slope) for place, slope in slopes.items()]
        curved = torch.autograd.grad(
            [*slopes.values()], parameters, directions, retain_graph=True, materialize_grads=True
        )
        product = torch.cat([c.detach().reshape(-1).to(device, torch.float32) for c in curved])
        return product if scale is None else product * scale

    generator = torch.Generator(device).manual_seed(0)
    vector = torch.randn(sum(sizes), device=device, generator=generator)
    vector /= vector.norm()
    before, beta, value = torch.zeros_like(vector), 0.0, math.nan
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(products, sum(sizes))):
        following = multiply(vector) - beta * before
        diagonal.append(float(following @ vector))
        following -= diagonal[-1] * vector
        beta = float(following.norm())
        if not math.isfinite(beta):
            return math.nan
        values, vectors = np.linalg.eigh(
            np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        )
        value = float(values[-1])
        if beta * abs(vectors[-1, -1]) <= _TOLERANCE * abs(value) or beta == 0.0:
            break
        beside.append(beta)
        before, vector = vector, following / beta
    return value


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yields the autograd functions that computed the tensors, down to the leaves."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            yield node


def _stable_product(optimizer: torch.optim.Optimizer | None) -> float:
    """Returns the product of the largest stable learning rate and the sharpness; NaN if it is not known.

    It is 2 for gradient descent, ``2 (1 + momentum)`` with momentum, ``2 (1 + momentum) / (1 + 2 momentum)`` with
    Nesterov's (Cohen et al. 2021), and ``2 (1 + beta1) / (1 - beta1)`` for Adam, for which the sharpness of the
    preconditioned Hessian counts (Cohen et al. 2022).
    """
    if optimizer is None:
        return 2.0
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.Adam):
        beta = float(group["betas"][0])
        return 2 * (1 + beta) / (1 - beta)
    if isinstance(optimizer, (torch.optim.SGD, torch.optim.RMSprop)):
        beta = float(group["momentum"])
        nesterov = 1 + 2 * beta if group.get("nesterov") else 1.0
        return 2 * (1 + beta) / nesterov / (1 - float(group.get("dampening", 0.0)))
    return math.nan


def _step_scale(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], squares: Sequence[Tensor]
) -> Tensor | None:
    """Returns the diagonal matrix S for which the optimizer is gradient descent on ``S H S``; None for the identity."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    base = float(optimizer.param_groups[0]["lr"]) or 1.0
    adaptive = isinstance(optimizer, (torch.optim.Adam, torch.optim.RMSprop))
    parts = []
    for p, square in zip(parameters, squares, strict=True):
        group: dict[str, Any] = groups.get(id(p), {"lr": 0.0})
        part = torch.full(p.shape, float(group["lr"]) / base, device=parameters[0].device)
        if adaptive and id(p) in groups:
            part /= _second_moment(optimizer.state.get(p, {}), group, square).sqrt() + group["eps"]
        parts.append(part.reshape(-1))
    scale = torch.cat(parts).sqrt()
    return None if bool((scale == 1).all()) else scale


def _second_moment(state: Mapping[str, Any], group: Mapping[str, Any], square: Tensor) -> Tensor:
    found: Tensor | None = state.get("exp_avg_sq", state.get("square_avg"))
    if found is None or not float(state.get("step", 0)):
        return square
    if "betas" in group:
        found = found / (1 - float(group["betas"][1]) ** float(state["step"]))
    return found.detach().float()
