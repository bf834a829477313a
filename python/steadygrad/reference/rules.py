"""Update rules of ``torch.optim``: one step of one parameter.

Each rule takes a parameter, its gradient and its state, and returns the new parameter and the new
state; what is passed in is never written. The state is a dict of float64 arrays under torch's names
(``step`` is 0-d); it is ``{}`` before the first step. ``lr`` is required, every other default is
torch's. Non-finite values go through as IEEE arithmetic has it, without a warning, as in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from .norm import Array

State: TypeAlias = dict[str, Array]
Result: TypeAlias = tuple[Array, State]


def _float64(
    param: ArrayLike, grad: ArrayLike, state: Mapping[str, ArrayLike], maximize: bool
) -> tuple[Array, Array, State]:
    """Return parameter, gradient of the function to minimize, and a new dict with the state."""
    grad = np.asarray(grad, dtype=np.float64)
    new_state = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    return np.asarray(param, dtype=np.float64), -grad if maximize else grad, new_state


def _next_step(state: State) -> float:
    """Count a step in ``state`` and return its number, 1 for the first."""
    state["step"] = np.asarray(state.get("step", 0.0) + 1.0)
    return float(state["step"])


def _lerp(start: Array, end: Array, weight: float) -> Array:
    """Return ``start + weight * (end - start)`` as ``torch.lerp`` does: exact at both ends."""
    if weight < 0.5:
        return start + weight * (end - start)
    return end - (end - start) * (1 - weight)


@np.errstate(all="ignore")
def sgd(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Result:
    """Take one step of ``torch.optim.SGD``.

    Formula, with ``g = -grad`` for ``maximize``::

        g = g + weight_decay * p
        b = g on the first step, else momentum * b + (1 - dampening) * g    when momentum != 0
        g = g + momentum * b for nesterov, else b                           when momentum != 0
        p = p - lr * g

    State: ``momentum_buffer`` (b), when ``momentum != 0``. Source: ``torch.optim.SGD``; Sutskever
    et al. 2013, "On the importance of initialization and momentum in deep learning".
    """
    param, grad, state = _float64(param, grad, state, maximize)
    if weight_decay != 0:
        grad = grad + weight_decay * param
    if momentum != 0:
        if "momentum_buffer" in state:
            buffer = momentum * state["momentum_buffer"] + (1 - dampening) * grad
        else:
            buffer = grad.copy()
        state["momentum_buffer"] = buffer
        grad = grad + momentum * buffer if nesterov else buffer
    return param - lr * grad, state


@np.errstate(all="ignore")
def adam(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Result:
    """Take one step of ``torch.optim.Adam``, or of ``AdamW`` with ``decoupled_weight_decay``.

    Formula, with ``g = -grad`` for ``maximize`` and ``t`` the number of this step::

        p = p * (1 - lr * weight_decay)    when decoupled, else
        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        w = max(w, v) for amsgrad, else v
        p = p - lr / (1 - beta1^t) * m / (sqrt(w) / sqrt(1 - beta2^t) + eps)

    State: ``step`` (t), ``exp_avg`` (m), ``exp_avg_sq`` (v) and, for amsgrad, ``max_exp_avg_sq``
    (w). Source: ``torch.optim.Adam``; Kingma and Ba 2015; Reddi et al. 2018 (amsgrad); Loshchilov
    and Hutter 2019 (decoupled).
    """
    param, grad, state = _float64(param, grad, state, maximize)
    beta1, beta2 = betas
    step = _next_step(state)
    zeros = np.zeros_like(param)
    if weight_decay != 0:
        if decoupled_weight_decay:
            param = param * (1 - lr * weight_decay)
        else:
            grad = grad + weight_decay * param
    state["exp_avg"] = _lerp(state.get("exp_avg", zeros), grad, 1 - beta1)
    state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad * grad
    second_moment = state["exp_avg_sq"]
    if amsgrad:
        second_moment = np.maximum(state.get("max_exp_avg_sq", zeros), second_moment)
        state["max_exp_avg_sq"] = second_moment
    step_size = lr / (1 - beta1**step)
    denominator = np.sqrt(second_moment) / (1 - beta2**step) ** 0.5 + eps
    return param - step_size * state["exp_avg"] / denominator, state


@np.errstate(all="ignore")
def adagrad(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> Result:
    """Take one step of ``torch.optim.Adagrad``.

    Formula, with ``g = -grad`` for ``maximize`` and ``t`` the number of this step::

        g = g + weight_decay * p
        s = s + g^2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    State: ``step`` (t) and ``sum`` (s); torch's ``initial_accumulator_value`` is the value of
    ``sum`` that is passed in at the first step, 0 when it is absent. Source:
    ``torch.optim.Adagrad``; Duchi et al. 2011.
    """
    param, grad, state = _float64(param, grad, state, maximize)
    step = _next_step(state)
    if weight_decay != 0:
        grad = grad + weight_decay * param
    state["sum"] = state.get("sum", np.zeros_like(param)) + grad * grad
    decayed_lr = lr / (1 + (step - 1) * lr_decay)
    return param - decayed_lr * grad / (np.sqrt(state["sum"]) + eps), state


@np.errstate(all="ignore")
def rmsprop(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Result:
    """Take one step of ``torch.optim.RMSprop``.

    Formula, with ``g = -grad`` for ``maximize``::

        g = g + weight_decay * p
        v = alpha * v + (1 - alpha) * g^2
        a = alpha * a + (1 - alpha) * g                       when centered, else a = 0
        d = g / (sqrt(v - a^2) + eps)
        b = momentum * b + d                                  when momentum > 0, else b = d
        p = p - lr * b

    State: ``step``, ``square_avg`` (v), ``grad_avg`` (a) when centered and ``momentum_buffer`` (b)
    when ``momentum > 0``. Source: ``torch.optim.RMSprop``; Hinton, Neural Networks for Machine
    Learning, lecture 6e; Graves 2013 (centered).
    """
    param, grad, state = _float64(param, grad, state, maximize)
    _next_step(state)
    zeros = np.zeros_like(param)
    if weight_decay != 0:
        grad = grad + weight_decay * param
    state["square_avg"] = alpha * state.get("square_avg", zeros) + (1 - alpha) * grad * grad
    variance = state["square_avg"]
    if centered:
        state["grad_avg"] = _lerp(state.get("grad_avg", zeros), grad, 1 - alpha)
        variance = variance - state["grad_avg"] * state["grad_avg"]
    update = grad / (np.sqrt(variance) + eps)
    if momentum > 0:
        update = momentum * state.get("momentum_buffer", zeros) + update
        state["momentum_buffer"] = update
    return param - lr * update, state


RULES: dict[str, Callable[..., Result]] = {
    "SGD": sgd,
    "Adam": adam,
    "AdamW": functools.partial(adam, weight_decay=1e-2, decoupled_weight_decay=True),
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
}
