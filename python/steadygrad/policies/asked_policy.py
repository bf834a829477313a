"""Calls a clip policy that is written in Python between the passes of a step, and saves its state."""

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

# The policy's memory has a row per scope; these are the columns of the limit and of the norm.
_LIMIT, _NORM = (_kernels.POLICY_ROW[name] for name in ("limit", "norm"))

# The dtypes that a policy may return; tensors of some other dtypes cannot be compared with 0.
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
    """Connects a user's policy with an optimizer; in the param groups its state is ``[name, text]``.

    Args:
        key: The key of the param groups that holds the state.
        policy: The user's policy.
        fresh: The state, as text, that the policy had when the optimizer took it over. None means that the optimizer
            takes it over now.
    """

    def __init__(self, key: str, policy: ClipPolicy, fresh: str | None = None) -> None:
        self._key = key
        self._policy = policy
        self._name = type(policy).__name__
        # The entry of the param groups that the policy's state equals. Where the optimizer took the policy over
        # earlier, a state may have been loaded since, so the first step reads the entry.
        self._known: Any = None if fresh is None else _UNREAD
        # A state that cannot be saved is refused here, before any training is lost.
        self.fresh = self._text() if fresh is None else fresh
        self._unsaved: Exception | None = None
        self._rows: Tensor | None = None
        self._lone: tuple[Tensor, Tensor] | None = None
        self._replaced: list[Tensor] = []

    def rows(self, groups: Groups, scopes: int, device: torch.device) -> Tensor:
        """Returns the memory for a step's norms and limits, after loading a state that came since the last step."""
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
        """Refuses a saved state whose text cannot be parsed; the policy itself judges the contents when it loads."""
        self._state_of(saved, torch.device("cpu"))

    def _state_of(self, saved: Any, device: torch.device) -> dict[str, Any]:
        text = self.fresh
        if isinstance(saved, (list, tuple)) and len(saved) == 2 and saved[0] == self._name:
            text = saved[1]
        try:
            return state_of(text, device)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"param_groups: {self._key}: expected [{self._name!r}, its state as text], got a text that is no "
                f"state: {error}"
            ) from error

    def reduction(
        self, of_processes: _kernels.Reduction | None, sums: int, slots: int
    ) -> _kernels.Reduction:
        """Returns what the kernels call between the passes: the sums over processes, if any, and this policy.

        Args:
            of_processes: The reduction over several processes, or None for a single process.
            sums: The number of rows of sums that a single process needs.
            slots: The number of parameters.
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
        """Writes the state to the param groups, unless one was loaded there since; waits for the device.

        An error is kept for :meth:`check_saved`, since not everything that saves an optimizer needs the state.
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
        """Raises the error that :meth:`save` has kept, if any."""
        unsaved, self._unsaved = self._unsaved, None
        if unsaved is not None:
            raise unsaved

    def take_back(self, groups: Groups) -> None:
        """Removes from the param groups what :meth:`save` has written there."""
        if self._known is None or groups[0].get(self._key) is not self._known:
            return
        self._known = None
        for group in groups:
            group[self._key] = None

    def _text(self) -> str:
        return text_of(f"{self._name}.state_dict", self._policy.state_dict())

    def _ask_alike(self, others: Any) -> None:
        """Asks the policy for limits; if it raises on one rank, raises on all, since their parameters would diverge."""
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
                f"step: clip: {self._name}.limits: expected a limit on every rank, got an exception on another rank, "
                "whose message says why; nothing was changed on any rank"
            )

    @torch.no_grad()
    def _ask(self) -> None:
        assert self._rows is not None
        norms, limits = self._rows[:, _NORM], self._rows[:, _LIMIT]
        _put(f"step: clip: {self._name}.limits", self._policy.limits(norms.clone()), limits)


def _put(where: str, given: Any, limits: Tensor) -> None:
    """Checks the limits that a policy returned and writes them to the memory that the kernels read."""
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
