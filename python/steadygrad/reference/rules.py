"""Update rules of ``torch.optim``, and Lion: one step of one parameter.

Each rule takes a parameter, its gradient and its state, and returns the new parameter and the new state. Its arguments
are never written to. The state is a dict of float64 arrays with torch's names (``step`` is 0-d), and ``{}`` before the
first step. ``lr`` is required; all other defaults are torch's. Non-finite values follow IEEE arithmetic, without a
warning, as in torch.
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
    """Returns the parameter, the gradient of the function to minimize, and a new dict with the state."""
    grad = np.asarray(grad, dtype=np.float64)
    new_state = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    return np.asarray(param, dtype=np.float64), -grad if maximize else grad, new_state


def _next_step(state: State) -> float:
    """Counts a step in ``state`` and returns its number, 1 for the first."""
    state["step"] = np.asarray(state.get("step", 0.0) + 1.0)
    return float(state["step"])


def _lerp(start: Array, end: Array, weight: float) -> Array:
    """Returns ``start + weight * (end - start)`` as ``torch.lerp`` does, exactly at both ends."""
    if weight < 0.5:
        return start + weight * (end - start)
    return end - (end - start) * (1 - weight)


def _sign(value: Array) -> Array:
    """Returns the sign as torch does: 0 for NaN."""
    return np.where(value > 0, 1.0, np.where(value < 0, -1.0, 0.0))


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
    """Takes one step of ``torch.optim.SGD``.

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
    """Takes one step of ``torch.optim.Adam``, or of ``AdamW`` with ``decoupled_weight_decay``.

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
    """Takes one step of ``torch.optim.Adagrad``.

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
    """Takes one step of ``torch.optim.RMSprop``.

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


@np.errstate(all="ignore")
def adamax(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Result:
    """Takes one step of ``torch.optim.Adamax``.

    Formula, with ``g = -grad`` for ``maximize`` and ``t`` the number of this step::

        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, |g| + eps)
        p = p - lr / (1 - beta1^t) * m / u

    State: ``step`` (t), ``exp_avg`` (m) and ``exp_inf`` (u). Source: ``torch.optim.Adamax``; Kingma
    and Ba 2015, section 7.1.
    """
    param, grad, state = _float64(param, grad, state, maximize)
    beta1, beta2 = betas
    step = _next_step(state)
    zeros = np.zeros_like(param)
    if weight_decay != 0:
        grad = grad + weight_decay * param
    state["exp_avg"] = _lerp(state.get("exp_avg", zeros), grad, 1 - beta1)
    state["exp_inf"] = np.maximum(state.get("exp_inf", zeros) * beta2, np.abs(grad) + eps)
    return param - lr / (1 - beta1**step) * (state["exp_avg"] / state["exp_inf"]), state


@np.errstate(all="ignore")
def nadam(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Result:
    """Takes one step of ``torch.optim.NAdam``.

    Formula, with ``g = -grad`` for ``maximize`` and ``t`` the number of this step::

        p = p * (1 - lr * weight_decay)    when decoupled, else
        g = g + weight_decay * p
        mu(t) = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        M = mu(1) * mu(2) * ... * mu(t)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        d = sqrt(v / (1 - beta2^t)) + eps
        p = p - lr * (1 - mu(t)) / (1 - M) * g / d - lr * mu(t + 1) / (1 - M * mu(t + 1)) * m / d

    State: ``step`` (t), ``mu_product`` (M), ``exp_avg`` (m) and ``exp_avg_sq`` (v). Source:
    ``torch.optim.NAdam``; Dozat 2016, "Incorporating Nesterov momentum into Adam".
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
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    next_mu = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    mu_product = state.get("mu_product", np.ones(())) * mu
    state["mu_product"] = np.asarray(mu_product)
    state["exp_avg"] = _lerp(state.get("exp_avg", zeros), grad, 1 - beta1)
    state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad * grad
    denominator = np.sqrt(state["exp_avg_sq"] / (1 - beta2**step)) + eps
    param = param - lr * (1 - mu) / (1 - mu_product) * (grad / denominator)
    step_size = lr * next_mu / (1 - mu_product * next_mu)
    return param - step_size * (state["exp_avg"] / denominator), state


@np.errstate(all="ignore")
def radam(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Result:
    """Takes one step of ``torch.optim.RAdam``.

    Formula, with ``g = -grad`` for ``maximize`` and ``t`` the number of this step::

        p = p * (1 - lr * weight_decay)    when decoupled, else
        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        R = 2 / (1 - beta2) - 1
        r = R - 2 * t * beta2^t / (1 - beta2^t)
        a = sqrt((r - 4) * (r - 2) * R / ((R - 4) * (R - 2) * r)) * sqrt(1 - beta2^t) / (sqrt(v) + eps)
            when r > 5, else 1
        p = p - lr / (1 - beta1^t) * m * a

    State: ``step`` (t), ``exp_avg`` (m) and ``exp_avg_sq`` (v). Source: ``torch.optim.RAdam``; Liu et
    al. 2020, "On the variance of the adaptive learning rate and beyond".
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
    bias_correction2 = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / bias_correction2
    update = state["exp_avg"] / (1 - beta1**step)
    if length > 5:
        rectification = (
            (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        ) ** 0.5
        denominator = np.sqrt(state["exp_avg_sq"]) + eps
        update = update * (rectification * bias_correction2**0.5 / denominator)
    return param - lr * update, state


@np.errstate(all="ignore")
def adadelta(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Result:
    """Takes one step of ``torch.optim.Adadelta``.

    Formula, with ``g = -grad`` for ``maximize``::

        g = g + weight_decay * p
        v = rho * v + (1 - rho) * g^2
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d^2
        p = p - lr * d

    State: ``step``, ``square_avg`` (v) and ``acc_delta`` (u). Source: ``torch.optim.Adadelta``; Zeiler
    2012, "Adadelta: an adaptive learning rate method".
    """
    param, grad, state = _float64(param, grad, state, maximize)
    _next_step(state)
    zeros = np.zeros_like(param)
    if weight_decay != 0:
        grad = grad + weight_decay * param
    state["square_avg"] = rho * state.get("square_avg", zeros) + (1 - rho) * grad * grad
    acc_delta = state.get("acc_delta", zeros)
    delta = np.sqrt(acc_delta + eps) / np.sqrt(state["square_avg"] + eps) * grad
    state["acc_delta"] = rho * acc_delta + (1 - rho) * delta * delta
    return param - lr * delta, state


@np.errstate(all="ignore")
def asgd(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Result:
    """Takes one step of ``torch.optim.ASGD``.

    Formula, with ``g = -grad`` for ``maximize``, ``t`` the number of this step, and at the first one
    ``eta = lr`` and ``mu = 1``::

        g = g + weight_decay * p
        p = p * (1 - lambd * eta) - eta * g
        a = a + mu * (p - a)
        eta = lr / (1 + lambd * lr * t)^alpha      for the next step
        mu = 1 / max(1, t - t0)                    for the next step

    State: ``step`` (t), ``eta``, ``mu`` and ``ax`` (a, the average). Source: ``torch.optim.ASGD``;
    Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """
    param, grad, state = _float64(param, grad, state, maximize)
    step = _next_step(state)
    if weight_decay != 0:
        grad = grad + weight_decay * param
    eta = float(state.get("eta", np.asarray(lr)))
    mu = float(state.get("mu", np.ones(())))
    param = param * (1 - lambd * eta) - eta * grad
    average = state.get("ax", np.zeros_like(param))
    state["ax"] = param.copy() if mu == 1 else average + mu * (param - average)
    state["eta"] = np.asarray(lr / (1 + lambd * lr * step) ** alpha)
    state["mu"] = np.asarray(1 / max(1.0, step - t0))
    return param, state


@np.errstate(all="ignore")
def rprop(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    maximize: bool = False,
) -> Result:
    """Takes one step of ``torch.optim.Rprop``.

    Formula, with ``g = -grad`` for ``maximize``, ``q`` the gradient of the step before (0 at the first
    one) and ``s = lr`` at the first one::

        s = s * etas[1]    where g * q > 0, kept within step_sizes
        s = s * etas[0]    where g * q < 0, kept within step_sizes; there g = 0
        p = p - s * sign(g)
        q = g

    State: ``step``, ``prev`` (q) and ``step_size`` (s). Source: ``torch.optim.Rprop``; Riedmiller and
    Braun 1993, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm".
    """
    param, grad, state = _float64(param, grad, state, maximize)
    _next_step(state)
    sign = _sign(grad * state.get("prev", np.zeros_like(param)))
    factor = np.where(sign > 0, etas[1], np.where(sign < 0, etas[0], 1.0))
    step_size = state.get("step_size", np.full_like(param, lr)) * factor
    state["step_size"] = np.clip(step_size, *step_sizes)
    state["prev"] = np.where(sign < 0, 0.0, grad)
    return param - state["step_size"] * _sign(state["prev"]), state


@np.errstate(all="ignore")
def lion(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, ArrayLike],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Result:
    """Takes one step of Lion, which ``torch.optim`` does not have.

    Formula, with ``g = -grad`` for ``maximize``::

        p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    State: ``exp_avg`` (m). Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms",
    program 1.
    """
    param, grad, state = _float64(param, grad, state, maximize)
    beta1, beta2 = betas
    exp_avg = state.get("exp_avg", np.zeros_like(param))
    update = _sign(beta1 * exp_avg + (1 - beta1) * grad)
    state["exp_avg"] = beta2 * exp_avg + (1 - beta2) * grad
    return param * (1 - lr * weight_decay) - lr * update, state


RULES: dict[str, Callable[..., Result]] = {
    "SGD": sgd,
    "Adam": adam,
    "AdamW": functools.partial(adam, weight_decay=1e-2, decoupled_weight_decay=True),
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adamax": adamax,
    "NAdam": nadam,
    "RAdam": radam,
    "Adadelta": adadelta,
    "ASGD": asgd,
    "Rprop": rprop,
    "Lion": lion,
}
