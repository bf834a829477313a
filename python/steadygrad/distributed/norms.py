"""Combines norms over several processes, between the two passes of a step or a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steadygrad import _kernels
from steadygrad.arguments import converted_to_float
from steadygrad.distributed.groups import (
    as_process_group,
    check_initialized,
    check_process_group,
)

# A row holds the numbers that core/scope_sums.h defines.
COLUMNS = len(_kernels.SCOPE_COLUMNS)
_MEDIUM = _kernels.SCOPE_COLUMNS.index("medium")


def reduce_norm(norm: Tensor | float, group: Any = None, norm_type: float = 2.0) -> Tensor:
    r"""Returns the norm of what all ranks of ``group`` hold, from the norm of what each of them holds.

    Use it where ranks hold different parameters that are not DTensors, such as pipeline stages and experts. The result
    is :math:`(\sum_r N_r^p)^{1/p}`, in float64 and relative to the largest :math:`N_r`, so that no power leaves the
    range, or the maximum for p = inf. It takes one collective, and has the same bits on all ranks:

    >>> norm = sg.get_total_norm([p.grad for p in stage.parameters() if p.grad is not None])
    >>> norm = sg.distributed.reduce_norm(norm, mesh["pp"])
    >>> sg.clip_grads_with_norm_(stage.parameters(), 1.0, norm)

    An optimizer does the same itself: ``sg.optim.AdamW(stage.parameters(), max_norm=1.0, reduce_norm=mesh["pp"])``.

    Args:
        norm: This rank's norm, a 0-d float32 or float64 tensor or a number. A rank without gradients passes 0.
        group: A process group, a device mesh of one dimension, or None for all ranks. All of its ranks have to call
            this function. Default: None.
        norm_type: The exponent p, more than 0: for other norms, a rank without elements would count. Default: 2.

    Returns:
        A 0-d tensor of the norm's dtype and device, without waiting for the device (float64 on the CPU for a number).
        It is infinite or NaN if the norm of some rank is.

    Raises:
        TypeError: ``norm`` is not a number, or ``group`` is none of the above.
        ValueError: ``norm_type`` is not positive, or the mesh has several dimensions.
        RuntimeError: The group was destroyed, or this rank is not a member.
    """
    p = converted_to_float("reduce_norm: norm_type", norm_type, "a number > 0", norm_type)
    if not p > 0:
        raise ValueError(f"reduce_norm: norm_type: expected a number > 0, got {norm_type!r}")
    if group is None:
        check_initialized("reduce_norm: group")
        group = dist.group.WORLD
    process_group = as_process_group("reduce_norm: group", group)
    if isinstance(norm, Tensor):
        if norm.numel() != 1 or norm.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                "reduce_norm: norm: expected a float32 or float64 tensor of one element or a number, got one of "
                f"shape {tuple(norm.shape)}, dtype {norm.dtype}"
            )
        own = norm.detach().double().reshape(1, 1)
    else:
        number = converted_to_float("reduce_norm: norm", norm, "a tensor or a number", norm)
        own = torch.tensor([[number]], dtype=torch.float64, device="cpu")
    total = power_sum(_gathered(own, process_group), p)[0, 0]
    return total.to(norm.dtype) if isinstance(norm, Tensor) else total


def power_sum(norms: Tensor, p: float) -> Tensor:
    r"""Returns :math:`(\sum N^p)^{1/p}` over the first dimension of float64 norms, relative to the extreme one."""
    extreme = norms.amin(0) if p < 0 else norms.amax(0)
    if math.isinf(p):
        return extreme
    ordinary = (extreme > 0) & extreme.isfinite()
    ratio = torch.where(ordinary, norms / extreme, 1.0)
    # The root is computed as the square of its half power, since it may leave the range although the product does not.
    root = ratio.pow(p).sum(0).pow(0.5 / p)
    return torch.where(ordinary, extreme * root * root, extreme)


def is_additive(p: float) -> bool:
    """Returns whether rows of several ranks are combined by adding them, so that a reduction will do."""
    return p in (0.0, 1.0, 2.0)


def combined_rows(stack: Tensor, p: float) -> Tensor:
    """Combines rows of several ranks or scopes, shape (n, rows, COLUMNS), to one set of rows."""
    total = stack.sum(0)
    if not is_additive(p):
        # The first row holds flags and counts, which are added whatever the norm is.
        total[1:, _MEDIUM] = power_sum(stack[:, 1:, _MEDIUM], p)
    return total


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the tensors of all ranks, shape (ranks, ...)."""
    gathered = tensor.new_empty(group.size() * tensor.shape[0], *tensor.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, tensor.contiguous(), group=group)
    return gathered.view(group.size(), *tensor.shape)


def reduce_rows(rows: Tensor, p: float, group: dist.ProcessGroup) -> None:
    """Combines the rows of all ranks in place, in one collective: a sum, or a gather for norms that are not sums."""
    if is_additive(p):
        dist.all_reduce(rows, group=group)
    else:
        rows.copy_(combined_rows(_gathered(rows, group), p))


class NormReduction:
    """Combines the rows that the first pass leaves with the rows of other ranks; called between the passes.

    First the rows are combined over all ranks of the parameters' meshes, in one collective. Then they are combined over
    each process group that was given, from the smallest to the largest. A row whose param groups belong to that process
    group differs on its ranks, so it is added up. A row that belongs to a larger group around it also differs, but has
    to wait for that group. All other rows are replicated, so only the group's first rank contributes them. Every
    collective also carries the counts and flags of non-finite elements, so that all ranks decide alike.

    Args:
        function: The function's name, with which messages start.
        group: The process group over the ranks of all meshes, or None.
        counted: For each tensor, whether this rank counts it.
        group_count: The number of param groups.
        extra: For each param group, a process group or None.
        norm_type: The exponent p.
        scope: What a limit applies to, ``"global"``, ``"group"`` or ``"tensor"``.
        per_tensor: Whether there is a row for each tensor.
        device: The device of the rows.
    """

    def __init__(
        self,
        function: str,
        group: dist.ProcessGroup | None,
        counted: Sequence[bool],
        group_count: int,
        extra: Sequence[dist.ProcessGroup | None],
        norm_type: float,
        scope: str,
        per_tensor: bool,
        device: torch.device,
    ) -> None:
        self._function = function
        self._group = group
        self._p = float(norm_type)
        self._group_rows = 1 + group_count
        rows = self._group_rows + (len(counted) if per_tensor else 0)
        self._rows = torch.empty(rows, COLUMNS, dtype=torch.float64, device=device)
        marks = torch.tensor(counted, dtype=torch.int32, device="cpu")
        self._counted = marks.to(device, non_blocking=True)
        # If a group is inside another one, its rows have to be complete before the outer group adds them up.
        distinct = dict.fromkeys(e for e in extra if e is not None)
        self._extra = sorted(distinct, key=dist.ProcessGroup.size)
        self._ranks = {e: set(dist.get_process_group_ranks(e)) for e in self._extra}
        self._parts = _parts(extra, per_group=scope == "group")

    @property
    def for_kernels(self) -> _kernels.Reduction:
        """Returns what the kernels take: the rows they fill, which tensors are counted, and this object to call."""
        for group in (self._group, *self._extra):
            if group is not None:
                check_process_group(f"{self._function}: process group", group)
        return _kernels.Reduction(rows=self._rows, counted=self._counted, reduce=self)

    def __call__(self) -> None:
        """Combines the rows of all ranks in place."""
        if self._group is not None:
            reduce_rows(self._rows, self._p, self._group)
        if not self._extra:
            return
        rows = self._rows[: self._group_rows]
        nothing = rows.new_zeros(COLUMNS)
        parts = [self._combined_part(rows, members) for members, _ in self._parts]
        payload = torch.stack([rows[0], *parts])
        for extra in self._extra:
            waiting = {}
            for row, (_, group) in enumerate(self._parts, start=1):
                if group is not None and self._ranks[group] > self._ranks[extra]:
                    waiting[row] = payload[row].clone()
                elif group is not extra and extra.rank() != 0:
                    payload[row] = nothing
            reduce_rows(payload, self._p, extra)
            for row, own in waiting.items():
                payload[row] = own
        rows.zero_()
        rows[0] = payload[0]
        for row, (members, _) in enumerate(self._parts, start=1):
            rows[1 + members[0]] = payload[row]

    def on_any_rank(self, happened: bool) -> bool:
        """Returns whether it happened on this rank or on one that steps together with it; waits for these ranks."""
        flag = self._rows.new_full((1,), float(happened))
        for group in (self._group, *self._extra):
            if group is not None:
                dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        return bool(flag.item())

    def _combined_part(self, rows: Tensor, members: list[int]) -> Tensor:
        if len(members) == 1:
            return rows[1 + members[0]]
        picked = torch.stack([rows[1 + member] for member in members])
        return combined_rows(torch.stack([torch.zeros_like(picked), picked], 1), self._p)[1]


def _parts(
    extra: Sequence[dist.ProcessGroup | None], per_group: bool
) -> list[tuple[list[int], dist.ProcessGroup | None]]:
    """Returns the param groups whose rows are combined as one, with the process group over which they differ."""
    if per_group:
        return [([number], group) for number, group in enumerate(extra)]
    members: dict[dist.ProcessGroup | None, list[int]] = {}
    for number, group in enumerate(extra):
        members.setdefault(group, []).append(number)
    return [(numbers, group) for group, numbers in members.items()]
