"""Stabilizes gradients that no kernel takes: norm, policies and clip by torch's own operations.

The definition is that of :mod:`steadygrad.reference.step`. As on the in-place path with kernels, the wrapped
optimizer's own step then makes the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steadygrad import _kernels, composite
from steadygrad.composite import Norm
from steadygrad.distributed.dtensors import local_tensor
from steadygrad.optim.composite_scopes import Gradient, Limits, Scopes
from steadygrad.policies.adaptive import CLIPPING, ClipAdaptive
from steadygrad.policies.on_host import NORM, enter_spike, is_spike
from steadygrad.without_kernels import check_tensor

if TYPE_CHECKING:
    from steadygrad.optim.options import StabilizerOptions

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class CompositeOutcome:
    """Holds what a step has decided; the attributes are those of ``_kernels.Outcome``."""

    norm: float
    nonfinite: int
    refused: bool
    skipped: bool
    spiked: bool
    clipped: bool


class CompositePlan:
    """Stabilizes the gradients of one optimizer; has the methods of ``_kernels.Plan`` that the in-place path calls.

    Every step waits once for each device, because a wrapped step cannot be undone and so the host has to decide.

    Args:
        rule: Name of the optimizer's rule; its numbers are checked if there is an extension that knows them.
        param_groups: Param groups of the optimizer.
        options: Options of the step.
        defaults: Values for limits that a param group lacks.
    """

    captured = False

    def __init__(
        self,
        rule: str,
        param_groups: Groups,
        options: StabilizerOptions,
        defaults: dict[str, float | None],
    ) -> None:
        self._rule = rule
        self._options = options
        self._defaults = defaults
        self._params = [list(group["params"]) for group in param_groups]
        self._gradients: list[Gradient] = []
        self._norms: list[Norm] = []
        self._outcome: CompositeOutcome | None = None

    @property
    def outcome(self) -> CompositeOutcome:
        """Returns what the last step has decided."""
        assert self._outcome is not None
        return self._outcome

    def seal(self, state: Mapping[Tensor, Any]) -> None:
        """Does nothing, since only the wrapped optimizer uses its state."""

    def matches(self, param_groups: Groups, state: Mapping[Tensor, Any]) -> bool:
        """Returns whether the parameters are still those that the plan was made for; refuses wrong numbers."""
        self._check(param_groups)
        if len(param_groups) != len(self._params):
            return False
        return all(
            len(group["params"]) == len(known)
            and all(param is before for param, before in zip(group["params"], known, strict=True))
            for group, known in zip(param_groups, self._params, strict=True)
        )

    def active(self) -> list[Tensor]:
        """Returns the parameters whose gradients took part in the last step."""
        return [gradient.param for gradient in self._gradients]

    def active_indices(self) -> list[int]:
        """Returns the indices of the parameters that took part in the last step."""
        return [gradient.place for gradient in self._gradients]

    def nonfinite(self) -> list[int]:
        """Returns the number of non-finite elements of each gradient of the last step."""
        return [norm.nonfinite for norm in self._norms]

    @torch.no_grad()
    def step(
        self,
        param_groups: Groups,
        state: Mapping[Tensor, Any],
        scaling: _kernels.Scaling | None,
        grads: Sequence[Tensor | None] | None,
        reduction: _kernels.Reduction | None,
        clip_rows: Tensor | None,
        skip_row: Tensor | None,
        telemetry: _kernels.Telemetry | None,
        skips_nonfinite: bool,
        creates_state: bool,
        memory: object,
    ) -> bool:
        """Decides, and changes the gradients in place unless the step is skipped or refused.

        The arguments are those of ``_kernels.Plan.step``.

        Returns:
            False, with nothing done, if the parameters were exchanged since the plan was made; else True.

        Raises:
            TypeError: Torch cannot compute with a gradient.
            ValueError: A number is out of range, or a gradient is expanded or has another shape than its parameter.
        """
        if not self.matches(param_groups, state):
            return False
        assert grads is not None  # The in-place path always passes them.
        options = self._options
        limits = [self._limits(group, creates_state) for group in param_groups]
        unscale, found_inf = _scaled_by(scaling)
        self._gradients = self._gathered(grads, limits)
        self._norms = composite.norms_of(
            [partial(self._unscaled, each, unscale) for each in self._gradients],
            options.norm_type,
        )
        scopes = Scopes(self._gradients, self._norms, options, limits)
        if reduction is not None and reduction.reduce is not None:
            found_inf = scopes.reduce(reduction, found_inf)
        total = scopes.total
        nonfinite = "skip" if skips_nonfinite else options.nonfinite
        skipped = found_inf or (total.nonfinite > 0 and nonfinite == "skip")
        refused = not skipped and total.nonfinite > 0 and nonfinite == "raise"
        scopes.zeroes = zeroes = total.nonfinite > 0 and nonfinite == "zero"
        scopes.clip = clip = None if clip_rows is None else clip_rows.numpy()
        spiked = clipped = False
        if not (skipped or refused):
            norm = scopes.seen(total)
            skip = None if skip_row is None else skip_row.numpy()[0]
            if skip is not None and options.skip is not None:
                spiked = skipped = is_spike(options.skip, skip, norm)
            if not spiked and clip is not None and reduction is not None and reduction.ask_policy:
                clip[:, NORM] = 0.0
                for scope, of_scope in scopes.norms.items():
                    clip[scope, NORM] = scopes.seen(of_scope)
                places = self._memory()
                reduction.ask_policy()
                if self._memory() != places:
                    raise RuntimeError(
                        "step: parameters: expected tensors that stay as they are while a clip policy's limits() "
                        "runs, got one whose memory, shape or dtype was replaced"
                    )
            if skip is not None and options.skip is not None:
                enter_spike(options.skip, skip, norm)
        taken = not (skipped or refused)
        units: list[Tensor | None] = []
        if taken:
            scopes.apply_policy()
            units = [self._unit_coefficients(each, unscale, zeroes) for each in self._gradients]
            clipped = scopes.is_clipped() or any(
                bool((of_units != 1).any()) for of_units in units if of_units is not None
            )
        norm = scopes.seen(total) if taken else total.norm
        self._outcome = CompositeOutcome(norm, total.nonfinite, refused, skipped, spiked, clipped)
        if telemetry is not None:
            self._record(telemetry, scopes)
        for each, of_units in zip(self._gradients, units, strict=False):
            self._write(each, unscale, zeroes, scopes.coefficient(each.group, each.place), of_units)
        return True

    # -- what there is --------------------------------------------------------------------------

    def _check(self, param_groups: Groups) -> None:
        clips_units = self._options.unit_clipping is not None
        _kernels.check_param_groups(self._rule, param_groups, self._defaults, clips_units, None)

    def _limits(self, group: dict[str, Any], creates_state: bool) -> Limits:
        def number(key: str) -> float:
            value = group.get(key, self._defaults.get(key))
            return math.inf if value is None else float(value)

        nothing = creates_state
        return Limits(
            max_norm=math.inf if nothing else number("max_norm"),
            clip_value=number("clip_value"),
            l1=0.0 if nothing or self._options.l1_mode == "proximal" else number("l1"),
            l2=0.0 if nothing else number("l2"),
            clipping=number(CLIPPING),
        )

    def _gathered(self, grads: Sequence[Tensor | None], limits: Sequence[Limits]) -> list[Gradient]:
        gathered: list[Gradient] = []
        place = -1
        for number, params in enumerate(self._params):
            for whole in params:
                place += 1
                grad = grads[place]
                if grad is None:
                    continue
                each = Gradient(place, number, local_tensor(whole), grad, limits[number])
                self._check_gradient(each)
                gathered.append(each)
        return gathered

    def _check_gradient(self, each: Gradient) -> None:
        where = f"step: parameters[{each.place}].grad"
        grad, limits = each.grad, each.limits
        check_tensor(where, grad)
        composite.check_writable(where, grad)
        if grad.device.type == "meta":
            raise TypeError(f"{where}: expected a tensor with memory, got one on meta")
        for name, tensor in ((f"step: parameters[{each.place}]", each.param), (where, grad)):
            # The wrapped optimizer's own step would crash on a tensor without storage.
            if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
                raise RuntimeError(
                    f"{name}: expected a tensor with memory, got one whose storage was freed"
                )
        by_unit = self._clips_units(limits)
        if by_unit and grad.is_complex():
            raise TypeError(
                f"step: parameters[{each.place}]: expected a real tensor, as complex ones cannot be clipped by unit, "
                f"got {grad.dtype}"
            )
        if (limits.l1 or limits.l2 or by_unit) and grad.shape != each.param.shape:
            raise ValueError(
                f"{where}: expected the shape of the parameter, {tuple(each.param.shape)}, got {tuple(grad.shape)}"
            )

    def _memory(self) -> list[Any]:
        """Returns the addresses and layouts of parameters and gradients, which tell whether the memory has changed."""
        return [
            (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            for each in self._gradients
            for tensor in (each.param, each.grad)
        ]

    def _clips_units(self, limits: Limits) -> bool:
        return self._options.unit_clipping is not None and limits.clipping != math.inf

    # -- the decision ---------------------------------------------------------------------------

    def _unit_coefficients(self, each: Gradient, unscale: float, zeroes: bool) -> Tensor | None:
        """Returns broadcastable factors of a gradient's units; None if the gradient is not clipped by unit."""
        if not self._clips_units(each.limits) or each.grad.numel() == 0:
            return None
        assert isinstance(self._options.clip, ClipAdaptive)
        grad = self._unscaled(each, unscale)
        if zeroes:
            grad = _with_zeros(grad)
        param_norms, grad_norms = _unit_norms(each.param), _unit_norms(grad)
        limits = each.limits.clipping * param_norms.clamp(min=self._options.clip.eps)
        factors = torch.where(
            grad_norms <= limits, torch.ones_like(grad_norms), limits / grad_norms
        )
        return factors.to(grad.dtype)

    # -- gradients ------------------------------------------------------------------------------

    def _unscaled(self, each: Gradient, unscale: float) -> Tensor:
        return self._before_clip(_read(each.grad), each, unscale)

    def _before_clip(self, value: Tensor, each: Gradient, unscale: float) -> Tensor:
        if unscale != 1:
            value = _scaled(value, unscale)
        if self._options.penalty_order == "before_clip":
            value = _with_penalty(value, each)
        return value

    def _write(
        self,
        each: Gradient,
        unscale: float,
        zeroes: bool,
        coefficient: float,
        of_units: Tensor | None,
    ) -> None:
        given = _read(each.grad)
        value = self._before_clip(given, each, unscale)
        if zeroes:
            value = _with_zeros(value)
        if of_units is not None:
            value = value * torch.minimum(of_units, torch.full_like(of_units, coefficient))
        elif coefficient != 1:
            value = _scaled(value, coefficient)
        limit = each.limits.clip_value
        if limit != math.inf:
            clamped = composite.as_real(value).clamp(-limit, limit)
            value = torch.view_as_complex(clamped) if value.is_complex() else clamped
        if self._options.penalty_order == "after_clip":
            value = _with_penalty(value, each)
        if value is not given:
            each.grad.copy_(value)

    # -- telemetry ------------------------------------------------------------------------------

    def _record(self, telemetry: _kernels.Telemetry, scopes: Scopes) -> None:
        outcome = self.outcome
        taken = not (outcome.skipped or outcome.refused)
        by_unit = scopes.clip is not None and self._options.unit_clipping is not None
        columns, flags = _kernels.TELEMETRY_COLUMNS, _kernels.TELEMETRY_FLAGS
        row = telemetry.rows.numpy()[int(telemetry.recorded) % telemetry.history]
        row[columns["norm"]] = outcome.norm
        known = taken and not (by_unit and outcome.clipped)
        row[columns["clipped_norm"]] = scopes.clipped_norm() if known else math.nan
        row[columns["limit"]] = scopes.total_limit(taken and not by_unit)
        row[columns["flags"]] = sum(flag for name, flag in flags.items() if getattr(outcome, name))
        row[columns["nonfinite"]] = outcome.nonfinite
        if telemetry.per_tensor:
            norms, counts = np.split(row[len(columns) :], 2)
            norms.fill(math.nan)
            counts.fill(0)
            for place, norm in scopes.tensors.items():
                norms[place], counts[place] = norm.norm, norm.nonfinite
        telemetry.recorded.add_(1)


def _scaled_by(scaling: _kernels.Scaling | None) -> tuple[float, bool]:
    """Returns the factor of the gradients, and whether a scaler has found infinities; waits for both.

    A scale that no gradient can be divided by skips the step, as it does in the kernels.
    """
    if scaling is None:
        return 1.0, False
    unscale, found_inf = scaling.unscale, scaling.found_inf
    if scaling.grad_scale_tensor is not None:
        scale = float(scaling.grad_scale_tensor)
        if not 0 < scale < math.inf:
            return 1.0, True
        unscale = 1.0 / scale
    if scaling.found_inf_tensor is not None:
        found_inf = float(scaling.found_inf_tensor) > 0
    return unscale, found_inf


def _read(grad: Tensor) -> Tensor:
    return composite.widened(grad.resolve_conj().resolve_neg())


def _scaled(value: Tensor, factor: float) -> Tensor:
    for part in composite.factors(value, factor):
        value = value * part
    return value


def _with_penalty(value: Tensor, each: Gradient) -> Tensor:
    l1, l2 = each.limits.l1, each.limits.l2
    return value + composite.penalty_gradient(each.param, l1, l2) if l1 or l2 else value


def _with_zeros(value: Tensor) -> Tensor:
    parts = composite.as_real(value)
    parts = torch.where(torch.isfinite(parts), parts, torch.zeros_like(parts))
    return torch.view_as_complex(parts) if value.is_complex() else parts


def _unit_norms(tensor: Tensor) -> Tensor:
    wide = composite.widened(tensor) if tensor.device.type == "mps" else tensor.double()
    units = wide.flatten(1) if wide.ndim >= 2 else wide.reshape(1, -1)
    # Dividing by the largest element keeps the squares within the range.
    largest = units.abs().amax(1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    norms: Tensor = scale * torch.linalg.vector_norm(units / scale, dim=1, keepdim=True)
    return norms.reshape(-1, *[1] * (wide.ndim - 1)) if wide.ndim >= 2 else norms.reshape(())
