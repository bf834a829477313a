"""Adds to a step or a function what it needs if several processes share its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from steadygrad import _kernels
from steadygrad.distributed.agreement import agreed_meshes
from steadygrad.distributed.dtensors import has_dtensors, local_gradients
from steadygrad.distributed.groups import as_process_group, check_process_group
from steadygrad.distributed.layout import Layout, layout_of
from steadygrad.distributed.norms import NormReduction
from steadygrad.distributed.parts import check_parts
from steadygrad.distributed.units import check_whole_units

if TYPE_CHECKING:
    from steadygrad.optim.options import StabilizerOptions


class Sharding:
    """Describes how ranks share the parameters of one optimizer; made anew whenever the parameters are exchanged.

    Args:
        param_groups: The param groups of the optimizer.
        options: The options of the step.
        previous: The sharding before, whose layout the ranks have agreed on, for use if the layout is still the same.
    """

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        options: StabilizerOptions,
        previous: Sharding | None,
    ) -> None:
        groups = [group["params"] for group in param_groups]
        self._params = [param for group in groups for param in group]
        self._has_dtensors = has_dtensors(self._params)
        extra = groups_to_reduce(options.reduce_norm, len(groups))
        self._layout: Layout | None = None
        over_meshes: dist.ProcessGroup | None = None
        counted = [True] * len(self._params)
        if self._has_dtensors:
            layout = None if previous is None else previous._layout
            if layout is None or not layout.is_of(groups):
                settings = _settings(param_groups, options, extra)
                layout = Layout("step", groups, anew=True, settings=settings)
            self._layout = layout
            over_meshes, counted = layout.group, layout.counted
        for group in dict.fromkeys(each for each in extra if each is not None):
            _agree_on_options(group, options, extra)
        self._reduction: NormReduction | None = None
        if over_meshes is not None or any(group is not None for group in extra):
            self._reduction = NormReduction(
                "step",
                over_meshes,
                counted,
                len(groups),
                extra,
                options.norm_type,
                options.scope,
                options.per_tensor,
                self._params[0].device if self._params else torch.device("cpu"),
            )

    @property
    def reduction(self) -> _kernels.Reduction | None:
        """Returns the reduction for the kernels; None if there is nothing to add up."""
        return None if self._reduction is None else self._reduction.for_kernels

    def gradients(self, sums: dict[Tensor, Tensor]) -> list[Tensor | None] | None:
        """Returns this process's part of each gradient or accumulated sum; None if there are no DTensors."""
        return local_gradients("step", self._params, sums) if self._has_dtensors else None


def sharding_of(
    param_groups: list[dict[str, Any]], options: StabilizerOptions, previous: Sharding | None
) -> Sharding | None:
    """Returns how the parameters are shared, or None if every parameter belongs to this process alone."""
    groups = [group["params"] for group in param_groups]
    params = [param for group in groups for param in group]
    clips_parameters = options.scope == "tensor" or options.unit_clipping is not None
    check_parts(param_groups, options.reduce_norm, clips_parameters)
    # A rank without parameters has to take part, too, if others wait for its norm.
    if options.reduce_norm is None and not has_dtensors(params):
        return None
    if options.unit_clipping is not None:
        check_whole_units(param_groups, options.unit_clipping)
    return Sharding(param_groups, options, previous)


# These options have to be the same on all ranks. Otherwise ranks would wait in different collectives, or diverge.
_SHARED_OPTIONS = (
    "clip",
    "skip",
    "scope",
    "nonfinite",
    "penalty_order",
    "l1_mode",
    "rounding",
    "state_dtype",
)
_SHARED_NUMBERS = ("max_norm", "clip_value", "l1", "l2")


def _settings(
    param_groups: Sequence[dict[str, Any]],
    options: StabilizerOptions,
    extra: list[dist.ProcessGroup | None],
) -> list[str]:
    """Returns a line on each option that ranks which share DTensors have to have in common."""
    lines = [f"norm_type is {float(options.norm_type)}"]
    for name in _SHARED_OPTIONS:
        shown = "clip_scope" if name == "scope" else name
        lines.append(f"{shown} is {options.shown(name)}")
    lines.append(f"telemetry is {options.telemetry_level!r}")
    sizes = [None if group is None else group.size() for group in extra]
    lines.append(f"reduce_norm has groups of {sizes} ranks")
    for i, group in enumerate(param_groups):
        for key in _SHARED_NUMBERS:
            value = group.get(key, getattr(options, key))
            number = None if value is None else float(value)
            lines.append(f"{key} of param_groups[{i}] is {number}")
        if options.unit_clipping is not None:
            clipping = group.get(_kernels.CLIPPING, options.unit_clipping)
            lines.append(f"{_kernels.CLIPPING} of param_groups[{i}] is {clipping}")
    return lines


def _agree_on_options(
    group: dist.ProcessGroup, options: StabilizerOptions, extra: list[dist.ProcessGroup | None]
) -> None:
    """Compares the options that collectives depend on, among ranks that hold different parameters."""
    if group.size() < 2:
        return
    names = {None: "replicated", group: "this group"}
    travel = [names.get(each, "another group") for each in extra]
    if options.scope != "group":
        travel = sorted(set(travel))
    settings = [
        f"norm_type is {float(options.norm_type)}",
        f"clip_scope is {options.scope!r}",
        f"clip is {options.shown('clip')}",
        f"skip is {options.skip!r}",
        f"nonfinite is {options.nonfinite!r}",
        f"reduce_norm has {', '.join(travel)}",
    ]
    ranks = tuple(sorted(dist.get_process_group_ranks(group)))
    agreed_meshes("step", ranks, [], [], settings, anew=False)


def groups_to_reduce(reduce_norm: Any, group_count: int) -> list[dist.ProcessGroup | None]:
    """Checks the option ``reduce_norm`` and returns a process group or None for each param group.

    Raises:
        TypeError: An entry is neither a process group, a device mesh nor None.
        ValueError: There is not exactly one entry per param group.
        RuntimeError: A group was destroyed, or this rank is not a member.
    """
    where = "step: reduce_norm"
    if reduce_norm is None:
        return [None] * group_count
    if not isinstance(reduce_norm, (list, tuple)):
        return [as_process_group(where, reduce_norm)] * group_count
    if len(reduce_norm) != group_count:
        raise ValueError(
            f"{where}: expected one entry per param group, {group_count}, got {len(reduce_norm)}"
        )
    return [
        None if group is None else as_process_group(f"{where}[{i}]", group)
        for i, group in enumerate(reduce_norm)
    ]


def list_reduction(
    function: str, tensors: Sequence[Tensor], taken: Sequence[bool], norm_type: float
) -> NormReduction | None:
    """Returns the reduction for a function on a list of tensors; the kernels get only those that are ``taken``."""
    layout = layout_of(function, tensors)
    if layout.group is None:
        return None
    counted = [counts for counts, here in zip(layout.counted, taken, strict=True) if here]
    device = tensors[0].device
    return NormReduction(
        function, layout.group, counted, 1, [None], norm_type, "global", False, device
    )


def reduced_sum(function: str, layout: Layout, value: Tensor) -> Tensor:
    """Adds up the values of all ranks in place, and returns the sum."""
    if layout.group is not None:
        check_process_group(f"{function}: process group", layout.group)
        dist.all_reduce(value, group=layout.group)
    return value
