"""The state of policies: on the parameters' device between steps, in the param groups when it is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.distributed.units import check_whole_units
from steadygrad.memory import keep_for_graphs
from steadygrad.policies.adaptive import CLIPPING, ClipAdaptive
from steadygrad.policies.asked_policy import AskedPolicy
from steadygrad.policies.clip_policy import ClipPolicy
from steadygrad.policies.policy import KernelPolicy

Groups = list[dict[str, Any]]

# Keys of every param group of an optimizer with such a policy; the values are None before the first step.
CLIP_STATE, SKIP_STATE = "clip_state", "skip_state"


class PolicyState:
    """Holds one policy's rows, float64 of shape (scopes, numbers per scope), which the kernels update in place.

    The param groups hold them as one list, ``[name, n, n numbers of the first scope, n, ...]``. Such lists can be
    compared, and every format of checkpoints can save them.

    Args:
        key: The key of the param groups that holds the list.
        policy: The policy whose rows these are.
    """

    def __init__(self, key: str, policy: KernelPolicy) -> None:
        self._key = key
        self._policy = policy
        self._rows: Tensor | None = None
        self._known: Any = None  # the entry of the param groups that the rows equal
        self._replaced: list[Tensor] = []

    def rows(self, groups: Groups, scopes: int, device: torch.device) -> Tensor:
        """Returns the rows for a step, after loading a list that came into the param groups since the last step."""
        saved = groups[0].get(self._key) if groups else None
        rows = self._rows
        if rows is not None and rows.shape[0] == scopes and rows.device == device:
            if saved is not self._known:
                self._fill(rows, saved)
            return rows
        made = torch.zeros(scopes, self._policy.row_size, dtype=torch.float64, device=device)
        if rows is not None:
            keep_for_graphs(self._replaced, rows)
        if rows is None or saved is not self._known:
            self._fill(made, saved)
        elif rows.shape[0] <= scopes:
            # A scope is known by its place. New scopes come last; if some are gone, the places say nothing any more.
            made[: rows.shape[0]].copy_(rows)
        self._rows = made
        return made

    def save(self, groups: Groups) -> None:
        """Writes the rows to the param groups, which waits for the device if there was a step."""
        if self._rows is None or not groups:
            return
        loaded = groups[0].get(self._key)
        if loaded is not self._known:  # loaded since the last step
            self._fill(self._rows, loaded)
            return
        saved: list[Any] = [type(self._policy).__name__]
        for row in self._rows.tolist():
            numbers = self._policy.saved(row)
            saved += [len(numbers), *numbers]
        self._known = saved
        for group in groups:
            group[self._key] = saved

    def take_back(self, groups: Groups) -> None:
        """Removes from the param groups what :meth:`save` has written, so that a printed optimizer stays short."""
        if self._known is None or groups[0].get(self._key) is not self._known:
            return
        self._known = None
        for group in groups:
            group[self._key] = None

    def check(self, saved: Any) -> None:
        """Refuses a saved list that :meth:`rows` could not load."""
        _rows_of(self._key, self._policy, saved)

    def _fill(self, rows: Tensor, saved: Any) -> None:
        listed = _rows_of(self._key, self._policy, saved)
        self._known = saved
        rows.zero_()
        if listed:
            listed = listed[: rows.shape[0]]
            values = torch.tensor(listed, dtype=torch.float64, device="cpu")
            rows[: len(listed)].copy_(values, non_blocking=True)


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < math.inf and value == int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and (value >= 0 or value != value)


def _shortened(saved: Any) -> str:
    text = repr(list(saved[:4]))
    return f"{text[:-1]}, ...]" if len(saved) > 4 else text


def _rows_of(key: str, policy: KernelPolicy, saved: Any) -> list[list[float]]:
    """Returns the rows of a saved list; none if another policy, or the same one with other numbers, has saved it.

    Raises:
        ValueError: The value is not such a list.
    """
    if not isinstance(saved, Sequence) or not saved or saved[0] != type(policy).__name__:
        return []
    rows, at = [], 1
    while at < len(saved):
        count = int(saved[at]) if _is_count(saved[at]) else -1
        numbers = saved[at + 1 : at + 1 + count] if count >= 0 else None
        if numbers is None or len(numbers) != count or not all(map(_is_number, numbers)):
            raise ValueError(
                f"param_groups: {key}: expected [name, n, n numbers of the first scope, n, ...], got something else "
                f"from entry {at} on: {_shortened(saved[at:])}"
            )
        row = policy.restored(numbers)
        if row is None:
            return []
        rows.append(row)
        at += 1 + count
    return rows


class PolicyStates:
    """Holds the states of an optimizer's clip policy and skip policy, either of which may be absent.

    Args:
        clip: The clip policy, with or without state.
        skip: The skip policy.
        scope: The scope of the clip.
        per_tensor: Whether the step also computes the norm of every tensor.
        fresh: The attribute ``fresh`` of the states that the same optimizer had before; None for its first states.
    """

    def __init__(
        self,
        clip: ClipPolicy | None,
        skip: KernelPolicy | None,
        scope: str,
        per_tensor: bool,
        fresh: str | None = None,
    ) -> None:
        self._clip: PolicyState | AskedPolicy | None = None
        if isinstance(clip, KernelPolicy):
            self._clip = None if clip.for_kernels is None else PolicyState(CLIP_STATE, clip)
        elif clip is not None:
            self._clip = AskedPolicy(CLIP_STATE, clip, fresh)
        self._skip = None if skip is None else PolicyState(SKIP_STATE, skip)
        self._scope = scope
        self._per_tensor = per_tensor
        self._adaptive = clip if isinstance(clip, ClipAdaptive) else None
        self._left_out: list[bool] = []

    @property
    def fresh(self) -> str | None:
        """Returns the state that a policy written in Python had when the optimizer took it over."""
        return self._clip.fresh if isinstance(self._clip, AskedPolicy) else None

    def __bool__(self) -> bool:
        """Returns whether there is a policy that keeps rows."""
        return self._clip is not None or self._skip is not None

    def rows(
        self, groups: Groups, device: torch.device | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the rows of both policies for a step on ``device``; None stands for the CPU."""
        if self._adaptive is not None:
            left_out = [group.get(CLIPPING, 0.0) is None for group in groups]
            if left_out != self._left_out:
                check_whole_units(groups, self._adaptive.clipping)
                self._left_out = left_out
        device = torch.device("cpu") if device is None else device
        scopes = {"global": 1, "group": len(groups)}.get(self._scope)
        if scopes is None:
            scopes = sum(len(group["params"]) for group in groups)
        return (
            None if self._clip is None else self._clip.rows(groups, scopes, device),
            None if self._skip is None else self._skip.rows(groups, 1, device),
        )

    def reduction(
        self, of_processes: _kernels.Reduction | None, groups: Groups
    ) -> _kernels.Reduction | None:
        """Returns what the kernels call between the passes: a sum over processes, and a policy written in Python."""
        if not isinstance(self._clip, AskedPolicy):
            return of_processes
        slots = sum(len(group["params"]) for group in groups)
        sums = 1 + len(groups) + (slots if self._per_tensor else 0)
        return self._clip.reduction(of_processes, sums, slots)

    def check_loaded(self, group: dict[str, Any]) -> None:
        """Refuses a param group of a state dict whose policy states could not be loaded.

        Raises:
            ValueError: A state is malformed.
        """
        for key, state in ((CLIP_STATE, self._clip), (SKIP_STATE, self._skip)):
            if state is not None:
                state.check(group.get(key))

    def check_saved(self) -> None:
        """Raises the error that a policy written in Python raised when its state was to be saved, if any."""
        if isinstance(self._clip, AskedPolicy):
            self._clip.check_saved()

    def save(self, groups: Groups) -> None:
        """Writes the states to the param groups, which waits for the device if there was a step."""
        for state in (self._clip, self._skip):
            if state is not None:
                state.save(groups)

    def take_back(self, groups: Groups) -> None:
        """Removes the states from the param groups, once a state dict was made of them."""
        for state in (self._clip, self._skip):
            if state is not None and groups:
                state.take_back(groups)
