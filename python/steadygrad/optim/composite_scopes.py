"""Norms of a composite step's gradients by clip scope, and the clip coefficients that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steadygrad import _kernels, composite
from steadygrad.composite import Norm
from steadygrad.policies.on_host import COEFFICIENT, LIMIT, apply_policy
from steadygrad.reference.clip import clip_coefficient

if TYPE_CHECKING:
    from steadygrad.optim.options import StabilizerOptions

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """Holds the limits and penalties of a param group; a limit of infinity limits nothing."""

    max_norm: float
    clip_value: float
    l1: float
    l2: float
    clipping: float


@dataclass(frozen=True)
class Gradient:
    """Holds a gradient of the step, with the index of its parameter, the index of its param group, and its limits."""

    place: int
    group: int
    param: Tensor
    grad: Tensor
    limits: Limits


class Scopes:
    """Holds the norms of a step's gradients by clip scope, and computes the clip coefficients.

    Attributes:
        total: Norm of all gradients.
        groups: Norm of each param group.
        tensors: Norm of each gradient by index of its parameter; of every parameter once processes are combined.
        norms: Norm of each clip scope that has gradients.
        zeroes: Whether non-finite elements count as 0.
        clip: Rows of the clip policy, or None.
    """

    def __init__(
        self,
        gradients: Sequence[Gradient],
        norms: Sequence[Norm],
        options: StabilizerOptions,
        limits: Sequence[Limits],
    ) -> None:
        self._gradients = gradients
        self._options = options
        self._limits = limits
        self._has_elements = {each.group for each in gradients if each.grad.numel() > 0}
        self.zeroes = False
        self.clip: Rows | None = None
        self.tensors = {each.place: norm for each, norm in zip(gradients, norms, strict=True)}
        self.total = composite.combined(norms, options.norm_type)
        self._set_groups([self._of_group(g, gradients) for g in range(len(limits))])

    def _of_group(self, group: int, gradients: Sequence[Gradient]) -> Norm:
        members = [self.tensors[each.place] for each in gradients if each.group == group]
        return composite.combined(members, self._options.norm_type)

    def _set_groups(self, groups: list[Norm]) -> None:
        self.groups = groups
        by_scope = {"global": {0: self.total}, "group": dict(enumerate(groups))}
        self.norms: dict[int, Norm] = by_scope.get(self._options.scope, self.tensors)

    def reduce(self, reduction: _kernels.Reduction, found_inf: bool) -> bool:
        """Combines the norms of all processes as in ``csrc/core/scope_sums.h``; returns whether any has found_inf."""
        p, groups = self._options.norm_type, len(self._limits)
        counted = reduction.counted.tolist()
        here = [each for each in self._gradients if counted[each.place]]
        rows = np.zeros(tuple(reduction.rows.shape))
        rows[0] = composite.row_of(Norm(float(found_inf), self.total.nonfinite), 1.0)
        for group in range(groups):
            rows[1 + group] = composite.row_of(self._of_group(group, here), p)
        per_tensor = len(rows) > 1 + groups
        for each in here if per_tensor else ():
            rows[1 + groups + each.place] = composite.row_of(self.tensors[each.place], p)
        flags, *norms = composite.reduced(rows, reduction, p)
        self.total = composite.with_flags(composite.combined(norms[:groups], p), flags)
        if per_tensor:
            self.tensors = dict(enumerate(norms[groups:]))
        self._set_groups(norms[:groups])
        self._has_elements |= {g for g, norm in enumerate(self.groups) if norm.norm > 0}
        return flags.finite_norm > 0

    def seen(self, norm: Norm) -> float:
        """Returns the norm that clips compare with their limits: of finite elements if others count as 0."""
        return norm.finite_norm if self.zeroes else norm.norm

    def apply_policy(self) -> None:
        """Lets the clip policy compute the coefficient of every scope, and learn from the norms."""
        if self.clip is None:
            return
        assert self._options.clip is not None
        for scope, norm in self.norms.items():
            total = self.seen(self.total)
            apply_policy(self._options.clip, self.clip[scope], self.seen(norm), total)

    def coefficient(self, group: int, place: int) -> float:
        """Returns the factor of a parameter's gradient: the smaller of the group limit's and the policy's."""
        scope = {"global": 0, "group": group}.get(self._options.scope, place)
        own = clip_coefficient(self._limits[group].max_norm, self.seen(self.norms[scope]))
        if self.clip is None or math.isnan(own):
            return own
        return min(own, float(self.clip[scope, COEFFICIENT]))

    def is_clipped(self) -> bool:
        """Returns whether a coefficient is not 1; of all processes, except if the limit is that of single tensors."""
        if self._options.scope == "tensor":
            return any(
                self.coefficient(each.group, each.place) != 1
                for each in self._gradients
                if each.grad.numel() > 0 or self.norms[each.place].norm > 0
            )
        return any(self.coefficient(group, 0) != 1 for group in self._has_elements)

    def clipped_norm(self) -> float:
        """Returns the norm of all gradients after the clip."""
        p = self._options.norm_type
        if self._options.scope == "tensor":
            own = {each.place: each.group for each in self._gradients}
            scaled = [
                self.seen(norm) * (self.coefficient(own[place], place) if place in own else 1.0)
                for place, norm in self.norms.items()
            ]
        else:
            coefficients = {g: self.coefficient(g, 0) for g in sorted(self._has_elements)}
            if self._options.scope == "global" and len(set(coefficients.values())) == 1:
                return next(iter(coefficients.values())) * self.seen(self.total)
            scaled = [c * self.seen(self.groups[g]) for g, c in coefficients.items()]
        return composite.combined([Norm(norm) for norm in scaled], p).finite_norm

    def total_limit(self, has_policy_limit: bool) -> float:
        """Returns the number that limits the total norm; NaN if no single number does."""
        of_groups = {self._limits[group].max_norm for group in self._has_elements}
        if self._options.scope != "global" or len(of_groups) != 1:
            return math.nan
        (limit,) = of_groups
        if self.clip is None:
            return limit
        return min(limit, float(self.clip[0, LIMIT])) if has_policy_limit else math.nan
