"""A clip policy in Python within a step: it is asked between the passes, and its state goes with the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.arguments import checked_number
from steadygrad.memory import is_asynchronous, keep_for_graphs
from steadygrad.policies.clip_policy import ClipPolicy
from steadygrad.policies.state_text import state_of, text_of

Groups = list[dict[str, Any]]

# A row per scope.
_LIMIT, _NORM = (_kernels.POLICY_ROW[name] for name in ("limit", "norm"))

# What a policy may give in a tensor; not all that torch stores can be compared.
_NUMBERS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_UNREAD = object()


class AskedPolicy:
    """One policy's place in an optimizer. In the param groups its state is ``[name, text]``.

    Args:
        key: of the param groups.
        policy: the user's.
        fresh: the state that it had when the optimizer took it over, as text; None if that is now.
    """

    def __init__(self, key: str, policy: ClipPolicy, fresh: str | None = None) -> None:
        self._key = key
        self._policy = policy
        self._name = type(policy).__name__
        # What the param groups held when both were the same. Later ones do not know what was loaded since.
        self._known: Any = None if fresh is None else _UNREAD
        # Refuses a state that cannot be saved before it is too late.
        self.fresh = self._text() if fresh is None else fresh
        self._unsaved: Exception | None = None
        self._rows: Tensor | None = None
        self._lone: tuple[Tensor, Tensor] | None = None
        self._replaced: list[Tensor] = []

    def rows(self, groups: Groups, scopes: int, device: torch.device) -> Tensor:
        """For a step. A state that was loaded since the last one takes the place of the policy's."""
        rows = self._rows
        if rows is None or rows.shape[0] != scopes or rows.device != device:
            if rows is not None:
                keep_for_graphs(self._replaced, rows)
            kernels = self._policy.for_kernels
            assert kernels is not None
            self._rows = rows = torch.zeros(
                scopes, kernels.row_size, dtype=torch.float64, device=device
            )
        saved = groups[0].get(self._key) if groups else None
        if saved is not self._known:
            state = self._state_of(saved, device)
            with torch.no_grad():
                self._policy.load_state_dict(state)
            self._known = saved
        return rows

    def check(self, saved: Any) -> None:
        """Refuses a state whose text says nothing; what the policy makes of it is its own."""
        self._state_of(saved, torch.device("cpu"))

    def _state_of(self, saved: Any, device: torch.device) -> dict[str, Any]:
        text = self.fresh
        if isinstance(saved, (list, tuple)) and len(saved) == 2 and saved[0] == self._name:
            text = saved[1]
        try:
            return state_of(text, device)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"param_groups: {self._key}: expected [{self._name!r}, its state as text], got a text that is none: "
                f"{error}"
            ) from error

    def reduction(
        self, of_processes: _kernels.Reduction | None, sums: int, slots: int
    ) -> _kernels.Reduction:
        """What the kernels take: how processes combine their sums, if there are several, and this policy's question.

        Args:
            of_processes: how they do, or None where there is one.
            sums: rows of sums that one process alone needs.
            slots: parameters.
        """
        if of_processes is not None:
            others = of_processes.reduce
            rows, counted = of_processes.rows, of_processes.counted
        else:
            others = None
            assert self._rows is not None
            device, lone = self._rows.device, self._lone
            fits = lone is not None and (len(lone[0]), len(lone[1])) == (sums, slots)
            if lone is None or not fits or lone[0].device != device:
                made = torch.empty(
                    sums, len(_kernels.SCOPE_COLUMNS), dtype=torch.float64, device=device
                )
                counted = torch.ones(slots, dtype=torch.int32, device=device)
                if lone is not None:
                    keep_for_graphs(self._replaced, *lone)
                lone = self._lone = (made, counted)
            rows, counted = lone
        return _kernels.Reduction(
            rows=rows, counted=counted, reduce=others, ask_policy=lambda: self._ask_alike(others)
        )

    def save(self, groups: Groups) -> None:
        """Brings the state to the param groups, unless one was loaded there; waits for the device.

        A state that cannot be saved is for :meth:`check_saved` to tell: not all that saves has to have it.
        """
        self._unsaved = None
        if self._rows is None or not groups or groups[0].get(self._key) is not self._known:
            return
        try:
            self._known = [self._name, self._text()]
        except Exception as error:
            self._known, self._unsaved = None, error
        for group in groups:
            group[self._key] = self._known

    def check_saved(self) -> None:
        """Raises what :meth:`save` has met."""
        unsaved, self._unsaved = self._unsaved, None
        if unsaved is not None:
            raise unsaved

    def take_back(self, groups: Groups) -> None:
        """What :meth:`save` has brought is theirs no longer."""
        if self._known is None or groups[0].get(self._key) is not self._known:
            return
        self._known = None
        for group in groups:
            group[self._key] = None

    def _text(self) -> str:
        return text_of(f"{self._name}.state_dict", self._policy.state_dict())

    def _ask_alike(self, others: Any) -> None:
        """Asks the policy. Where it raises on one rank, all ranks of the step raise, or their parameters would part."""
        rows = self._rows
        capturing = rows is not None and rows.is_cuda and torch.cuda.is_current_stream_capturing()
        if others is None or capturing:
            return self._ask()
        error: Exception | None = None
        try:
            self._ask()
        except Exception as raised:
            error = raised
        failed = others.on_any_rank(error is not None)
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(
                f"step: clip: {self._name}.limits: expected a limit on every rank, got an exception on another one, "
                "which has its message; nothing was changed on any rank"
            )

    @torch.no_grad()
    def _ask(self) -> None:
        assert self._rows is not None
        norms, limits = self._rows[:, _NORM], self._rows[:, _LIMIT]
        _put(f"step: clip: {self._name}.limits", self._policy.limits(norms.clone()), limits)


def _put(where: str, given: Any, limits: Tensor) -> None:
    """Leaves what a policy has given in the place for limits."""
    if not isinstance(given, Tensor) or (given.ndim == 0 and not is_asynchronous(given.device)):
        limits.fill_(checked_number(where, given, finite=False))
        return
    shape = tuple(limits.shape)
    kind = "" if given.layout == torch.strided else f"{given.layout} "
    got = f"a {kind}{given.dtype} tensor of shape {tuple(given.shape)} on {given.device}"
    if given.dtype not in _NUMBERS or given.layout != torch.strided:
        raise TypeError(
            f"{where}: expected a dense tensor of integers or of float16, bfloat16, float32 or float64, got {got}"
        )
    if tuple(given.shape) not in ((), shape) or given.device != limits.device:
        raise ValueError(
            f"{where}: expected a number, or a tensor of shape {shape} or () on {limits.device}, got {got}"
        )
    if not is_asynchronous(limits.device) and not bool((given >= 0).all()):
        bad = given[~(given >= 0)][0].item()
        raise ValueError(
            f"{where}: expected numbers >= 0, infinity for no limit, got {bad!r} among them"
        )
    limits.copy_(given)
