"""Bit-for-bit records of tensors and optimizers, for tests that a refused or skipped step changes nothing."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, so that NaN equals NaN and -0 differs from 0.

    A NaN made by a GPU has other bits than one made by a CPU, so every NaN gets the same bits.
    """
    values = tensor.detach().cpu()
    if values.is_sparse:
        values = values.coalesce().values()
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point():
        return values.clone()
    values = values.clone(memory_format=torch.contiguous_format)
    if values.element_size() > 1:  # torch cannot look for NaN in all dtypes of one byte
        values.masked_fill_(values.isnan(), math.nan)
    return values.reshape(-1).view(_INTEGERS[values.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors hold the same bits in the same shape and dtype."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same_tree(got: Any, want: Any, place: str = "state_dict") -> None:
    """Compare nested dicts, lists and tensors bit for bit."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor) and same_bits(got, want), f"{place}: {got} is not {want}"
    elif isinstance(want, dict):
        assert isinstance(got, dict) and got.keys() == want.keys(), f"{place}: keys differ"
        for key in want:
            assert_same_tree(got[key], want[key], f"{place}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), f"{place}: lengths differ"
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            assert_same_tree(one, other, f"{place}[{index}]")
    else:
        assert got == want or (got != got and want != want), f"{place}: {got!r} is not {want!r}"


class Snapshot:
    """A record of parameters, their gradients and an optimizer at the time when it was made."""

    def __init__(
        self,
        params: Iterable[Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        counters: bool = True,
    ) -> None:
        """Make the record; ``counters=False`` leaves out the two step counters."""
        self.params = list(params)
        self.optimizer = optimizer
        self.counters = counters
        self.values = [bits(p) for p in self.params]
        self.grads = [p.grad for p in self.params]
        self.grad_values = [None if g is None else bits(g) for g in self.grads]
        self.state = None if optimizer is None else self._state()

    def _state(self) -> Any:
        assert self.optimizer is not None
        state = copy.deepcopy(self.optimizer.state_dict())
        for group in state["param_groups"]:
            group.pop("recorded_steps", None)  # it counts every call, whatever its outcome
            if not self.counters:
                group.pop("skipped_steps", None)
                group.pop("clipped_steps", None)
        return state

    def assert_unchanged(self) -> None:
        """Fail if a bit, a gradient object or a state entry has changed."""
        for index, param in enumerate(self.params):
            assert torch.equal(bits(param), self.values[index]), f"parameter {index} changed"
            gradient, before = self.grads[index], self.grad_values[index]
            assert param.grad is gradient, f"gradient {index} was replaced"
            if gradient is not None and before is not None:
                assert torch.equal(bits(gradient), before), f"gradient {index} changed"
        if self.optimizer is not None:
            assert_same_tree(self._state(), self.state)


def assert_refused(
    call: Callable[[], object],
    error: type[Exception] | tuple[type[Exception], ...],
    *,
    function: str,
    argument: str,
    expected: str,
    got: str,
    unchanged: Sequence[Snapshot] = (),
) -> None:
    """Assert that a call raises, that the message has all parts, and that nothing changed.

    ``function``, ``argument``, ``expected`` and ``got`` are regular expressions; the message has to match all four, in
    any order.
    """
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    for role, pattern in (
        ("function", function),
        ("argument", argument),
        ("expectation", expected),
        ("value that came", got),
    ):
        assert re.search(pattern, message, re.IGNORECASE), f"no {role} ({pattern}) in: {message}"
    for snapshot in unchanged:
        snapshot.assert_unchanged()
