"""Ours beside torch where the device decides about steps, and a guard against waiting for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tests.backends import Backend
from tests.optim.optimizer_kinds import give
from tests.optim.optimizer_runs import assert_same_params, assert_same_state, make_ours, make_torch
from tests.optim.parameter_sets import dense_parameters

NAN = math.nan
Options = dict[str, Any]
DAMPENED: Options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
RULES: dict[str, tuple[str, Options]] = {
    "SGD": ("SGD", {"lr": 0.05}),
    "SGD-dampened": ("SGD", DAMPENED),
    "Adam-amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "Adagrad": ("Adagrad", {"lr": 0.05}),
    "RMSprop-both": ("RMSprop", {"lr": 0.001, "centered": True, "momentum": 0.5, "eps": 1e-3}),
    # These are the rules whose states have numbers beside the step counter, or no numbers at all.
    "NAdam": ("NAdam", {"lr": 0.01}),
    "ASGD": ("ASGD", {"lr": 0.05, "t0": 3.0}),
    "Lion": ("Lion", {"lr": 0.01}),
}
all_rules = pytest.mark.parametrize("rule", RULES)
both_ways = pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "subclass"])


def asynchronous_device(backend: Backend) -> torch.device:
    """Return a device that decides about steps; skip the test if the host does."""
    if not backend.asynchronous:
        pytest.skip("decisions of this backend are known to the host at once")
    return backend.device


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Fail on anything that makes the host wait for a device; on the host, on what would make it wait."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def waits(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("would wait for the device")

    names = ["item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, waits)
        yield


class Twins:
    """Ours beside torch's clip and optimizer, which does not get the gradients of steps that are to be skipped."""

    def __init__(self, rule: str, device: torch.device, wrap: bool = True, **ours: Any) -> None:
        name, options = RULES[rule]
        self.mine, self.theirs = (dense_parameters(device=device) for _ in range(2))
        self.max_norm = 1.0
        self.device = device
        self.ours = make_ours(name, self.mine, options, wrap, **{"max_norm": 1.0, **ours})
        self.torchs = make_torch(name, self.theirs, options)

    def step(
        self,
        seed: int,
        bad: float | None = None,
        without: Sequence[int] = (),
        guarded: bool = False,
    ) -> None:
        for params in (self.mine, self.theirs):
            give(params, seed, bad if params is self.mine else None)
            for index in without:
                params[index].grad = None
        with no_waiting(self.device) if guarded else nullcontext():
            self.ours.step()
        if bad is None:
            clip_grad_norm_([p for p in self.theirs if p.grad is not None], self.max_norm)
            self.torchs.step()

    def assert_equal(self) -> None:
        assert self.ours.path == "fused"
        assert_same_params(self.mine, self.theirs, torch.float32)
        assert_same_state(self.ours, self.torchs, torch.float32)
