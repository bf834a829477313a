"""The definition of a whole step: unscale, penalty, norm, non-finite policy, clip, update rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .clip import clip_coefficient
from .norm import Array, tensor_norm, total_norm
from .penalty import penalty_gradient, soft_threshold
from .rules import RULES, State

_CHOICES: dict[str, tuple[str, ...]] = {
    "rule": tuple(RULES),
    "penalty_order": ("before_clip", "after_clip"),
    "l1_mode": ("subgradient", "proximal"),
    "clip_scope": ("global", "group", "tensor"),
    "nonfinite": ("skip", "zero", "raise", "propagate"),
}


@dataclass(frozen=True)
class StepOptions:
    """The rule's name in ``RULES`` and the modes of a step, which are the same for all parameters.

    Raises:
        ValueError: The rule or a mode is unknown, or ``norm_type`` is NaN.
    """

    rule: str
    penalty_order: str = "before_clip"
    l1_mode: str = "subgradient"
    clip_scope: str = "global"
    nonfinite: str = "skip"
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"StepOptions: {name} must be one of {choices}, got {value!r}")
        if math.isnan(self.norm_type):
            raise ValueError("StepOptions: norm_type must be a number, got nan")


@dataclass(frozen=True)
class Group:
    """A param group: the indices of its parameters and its options.

    ``hyper`` holds the keyword arguments of the rule, ``lr`` among them. ``None`` for ``max_norm``
    or ``clip_value`` means no such clipping.

    Raises:
        ValueError: ``max_norm``, ``clip_value``, ``l1`` or ``l2`` is negative or NaN.
    """

    params: Sequence[int]
    hyper: Mapping[str, Any] = field(default_factory=dict)
    max_norm: float | None = None
    clip_value: float | None = None
    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_norm", "clip_value", "l1", "l2"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"Group: {name} must be non-negative, got {value}")


@dataclass(frozen=True)
class StepResult:
    """The result of a step; its lists are parallel to the arguments.

    ``grads`` are the gradients that the update rule saw, ``None`` for a parameter without one. ``norm`` is
    the global norm before clipping, whatever the clip scope. ``clipped`` says whether a coefficient
    was below 1. A skipped step returns parameters, states and gradients unchanged.
    """

    params: list[Array]
    states: list[State]
    grads: list[Array | None]
    norm: float
    skipped: bool
    clipped: bool


def _with_penalty(grad: Array, param: Array, group: Group, options: StepOptions) -> Array:
    l1 = group.l1 if options.l1_mode == "subgradient" else 0.0
    if l1 == 0 and group.l2 == 0:
        return grad
    return grad + penalty_gradient(param, l1, group.l2)


@np.errstate(all="ignore")
def step(
    params: Sequence[Array],
    grads: Sequence[Array | None],
    states: Sequence[State],
    groups: Sequence[Group],
    options: StepOptions,
    grad_scale: float = 1.0,
    found_inf: float = 0.0,
) -> StepResult:
    """Takes one step of all parameters. This function defines what a step is.

    For each parameter p with a gradient, in this order:

    1. unscale: ``g = grad / grad_scale``
    2. penalty, for ``penalty_order="before_clip"``: ``g += l1 * sign(p) + l2 * p``
    3. norm: ``N = ||g||`` over the clip scope: all parameters, those of the group, or p alone
    4. non-finite policy, if any element of any g is not finite: ``"skip"`` the step, set such elements to
       ``"zero"``, ``"raise"``, or ``"propagate"``. With ``found_inf > 0`` the step is skipped under every policy.
    5. clip: ``g *= min(1, max_norm / (N + 1e-6))``, then clamp to ``[-clip_value, clip_value]``
    6. penalty, for ``penalty_order="after_clip"``
    7. the update rule, including its own ``weight_decay``
    8. for ``l1_mode="proximal"``, instead of the sign term:
       ``p = sign(p) * max(|p| - lr * l1, 0)``

    Args:
        params: Arrays of any shape; the arithmetic is in float64, and they are never written to.
        grads: For each parameter an array of its shape, or ``None``.
        states: For each parameter a dict, ``{}`` before its first step; never written to.
        groups: Param groups; a parameter that is in no group is left out.
        options: Rule and modes.
        grad_scale: The loss scale by which the gradients are multiplied.
        found_inf: Number of devices on which a gradient scaler found a non-finite gradient.

    Raises:
        RuntimeError: A gradient is not finite under ``nonfinite="raise"``.
    """
    work: dict[int, Array] = {}
    for group in groups:
        for i in group.params:
            grad = grads[i]
            if grad is not None:
                work[i] = np.asarray(grad, dtype=np.float64) / grad_scale
                if options.penalty_order == "before_clip":
                    work[i] = _with_penalty(work[i], params[i], group, options)

    norm = total_norm(work.values(), options.norm_type)
    # The elements decide, not the norm: the norm of finite gradients can exceed float64.
    finite = all(np.isfinite(g).all() for g in work.values())
    if found_inf > 0 or (not finite and options.nonfinite == "skip"):
        return StepResult(
            list(params), list(states), list(grads), norm, skipped=True, clipped=False
        )
    if not finite and options.nonfinite == "raise":
        raise RuntimeError(f"step: gradients must be finite, got a total norm of {norm}")
    if not finite and options.nonfinite == "zero":
        work = {i: np.where(np.isfinite(g), g, 0.0) for i, g in work.items()}
        norm = total_norm(work.values(), options.norm_type)

    new_params, new_states, new_grads = list(params), list(states), list(grads)
    clipped = False
    for group in groups:
        members = [i for i in group.params if i in work]
        group_norm = total_norm([work[i] for i in members], options.norm_type)
        for i in members:
            g = work[i]
            if group.max_norm is not None:
                tensor = tensor_norm(g, options.norm_type)
                scope_norm = {"global": norm, "group": group_norm, "tensor": tensor}
                coefficient = clip_coefficient(group.max_norm, scope_norm[options.clip_scope])
                clipped = clipped or coefficient < 1
                g = g * coefficient
            if group.clip_value is not None:
                g = np.clip(g, -group.clip_value, group.clip_value)
            if options.penalty_order == "after_clip":
                g = _with_penalty(g, params[i], group, options)
            param, new_states[i] = RULES[options.rule](params[i], g, states[i], **group.hyper)
            if options.l1_mode == "proximal" and group.l1 > 0:
                param = soft_threshold(param, group.hyper["lr"] * group.l1)
            new_params[i], new_grads[i] = param, g
    return StepResult(new_params, new_states, new_grads, norm, skipped=False, clipped=clipped)
