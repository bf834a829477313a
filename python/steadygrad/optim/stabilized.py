"""Defines the base class of the Stabilizer and of the stabilized optimizer classes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steadygrad.composite import why_no_kernel
from steadygrad.distributed.parts import zero_redundancy_optimizer
from steadygrad.memory import Outcome
from steadygrad.optim.accumulation import Accumulated
from steadygrad.optim.groups import SettableLimits, make_plain, warn_of_other_limits
from steadygrad.optim.options import COUNTERS, SHARED_KEYS, StabilizerOptions
from steadygrad.optim.state import decision_device
from steadygrad.optim.step import Stepper
from steadygrad.parameter_names import set_parameter_names
from steadygrad.telemetry.history import History
from steadygrad.telemetry.recorder import Recorder
from steadygrad.telemetry.report import Report


class StabilizedOptimizer(SettableLimits):
    """Gives access to what a stabilized optimizer measured, and maintains its additional keys in param groups."""

    _options: StabilizerOptions
    _stepper: Stepper | None
    param_groups: list[dict[str, Any]]
    state: Any
    # This tells torch.amp.GradScaler to leave unscaling and skipping to step().
    _step_supports_amp_scaling = True
    # Whether the step has to find out whether gradients overflowed, because a scaler of ours will ask.
    _finds_inf = False

    def _make_stepper(self) -> Stepper:
        raise NotImplementedError

    def _genuine(self) -> StabilizedOptimizer:
        """Returns this object, or the one it wraps if it only imitates the class, as Lightning's optimizers do."""
        if "_options" in self.__dict__:
            return self
        wrapped = getattr(self, "optimizer", None)
        return wrapped if isinstance(wrapped, StabilizedOptimizer) else self

    def _current_stepper(self) -> Stepper:
        genuine = self._genuine()
        stepper = genuine.__dict__.get("_stepper")
        if stepper is None:
            stepper = genuine.__dict__["_stepper"] = genuine._make_stepper()
        return stepper

    @property
    def accumulated(self) -> Accumulated:
        """Returns the gradients that :func:`steadygrad.accumulate` has gathered for the next step."""
        own = self._genuine().__dict__
        accumulated: Accumulated = own.setdefault("_accumulated", Accumulated())
        return accumulated

    def _drop_accumulated(self) -> None:
        self.accumulated.check_closed("zero_grad")
        del self._genuine().__dict__["_accumulated"]

    @contextmanager
    def finding_inf(self) -> Iterator[None]:
        """Makes non-finite gradients skip steps whatever the policy is; for :class:`steadygrad.GradScaler`."""
        self._finds_inf = True
        try:
            yield
        finally:
            self._finds_inf = False

    def found_nonfinite(self) -> Tensor | None:
        """Returns 1.0 if the last step saw a non-finite gradient or was told of one, else 0.0, without waiting.

        The result is a 0-d fp32 tensor on the step's device, or None if the step raised before it was decided.
        """
        outcome = self._current_stepper().outcome
        if outcome is None:
            return None
        if isinstance(outcome, Outcome):
            return outcome.found_nonfinite()
        found = (outcome.skipped and not outcome.spiked) or outcome.nonfinite > 0
        return torch.tensor(float(found), dtype=torch.float32, device="cpu")

    def _join_zero_redundancy(self, own: Iterable[str]) -> None:
        """Computes norms over the ranks of a ``ZeroRedundancyOptimizer``, which gives each rank different parameters.

        That optimizer puts all keyword arguments into its param groups and so into ours, as others around a base
        optimizer do. The arguments that are not keys of a group are removed again: process groups cannot be pickled.

        Args:
            own: Names of the options that were given as keyword arguments.
        """
        zero = zero_redundancy_optimizer()
        holders = self.param_groups
        if zero is not None:
            holders = [*holders, *zero.param_groups, zero.defaults]
            if self._options.reduce_norm is None:
                self._options = self._options.changed(reduce_norm=zero.process_group)
        for name in set(own) - set(self._options.group_defaults()):
            for holder in holders:
                holder.pop(name, None)

    def _check_kernels(self) -> None:
        """Refuses options that only kernels support if no kernel takes the parameters."""
        params = [param for group in self.param_groups for param in group["params"]]
        why = why_no_kernel(params)
        if why is not None:
            self._options.storage.check_fits([], why, type(self).__name__)

    def _add_group_keys(self, kept: list[dict[str, Any]] | None = None) -> None:
        for i, group in enumerate(self.param_groups):
            defaults = kept[i] if kept is not None else self._options.group_defaults()
            for key, value in defaults.items():
                group.setdefault(key, value)

    def _enter_last_group(self) -> None:
        """Gives a group that was added the defaults, and the first group's values of keys that all groups share."""
        self._add_group_keys()
        first, last = self.param_groups[0], self.param_groups[-1]
        last.update({key: first[key] for key in SHARED_KEYS if key in first})

    def _kept_group_keys(self) -> list[dict[str, Any]]:
        keys = self._options.group_defaults()
        # A checkpoint without learnt state was saved before the policies had learnt anything.
        learnt = self._options.learnt_defaults()
        return [
            {**{key: group.get(key, keys[key]) for key in keys}, **learnt}
            for group in self.param_groups
        ]

    def _after_load(self, state_dict: dict[str, Any], kept: list[dict[str, Any]]) -> None:
        self._add_group_keys(kept)
        make_plain(self.param_groups)
        self._load_wide_state(state_dict)
        warn_of_other_limits(kept, self.param_groups)

    def _load_wide_state(self, state_dict: dict[str, Any]) -> None:
        if "state" not in state_dict:
            return  # A load_state_dict pre-hook has replaced the state dict.
        # torch casts state to the parameter's dtype, and state that was saved in fp32 would lose its low bits.
        saved = state_dict["state"]
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                if param.dtype not in (torch.bfloat16, torch.float16):
                    continue
                for key, value in saved.get(index, {}).items():
                    if isinstance(value, Tensor) and value.dtype == torch.float32:
                        self.state[param][key] = value.clone().to(param.device)

    @property
    def has_stepped(self) -> bool:
        """Returns whether a step was taken or skipped since the optimizer was made, copied or loaded."""
        return self._current_stepper().last_outcome is not None

    @property
    def grad_norm(self) -> Tensor:
        """Returns the global norm of the last step's gradients before clipping, 0-d; NaN before the first step.

        It is the norm after unscaling and after a penalty that comes before the clip. The tensor is on the parameters'
        device, which is not waited for (on the CPU if no kernel takes the parameters, since the step has waited), in
        fp64 if any parameter is fp64, else in fp32. It is infinite if the norm of finite gradients is beyond that
        dtype's range; they are clipped correctly all the same.
        """
        outcome = self._current_stepper().last_outcome
        params = [p for group in self.param_groups for p in group["params"]]
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        if isinstance(outcome, Outcome):
            return outcome.norm(wide)
        dtype = torch.float64 if wide else torch.float32
        if outcome is None:
            device = decision_device(self.param_groups) or torch.device("cpu")
            return torch.full((), math.nan, dtype=dtype, device=device)
        return torch.tensor(outcome.norm, dtype=dtype, device="cpu")

    @property
    def path(self) -> str:
        """Returns ``"fused"``, or ``"in-place: <why>"`` if the wrapped optimizer's own step does the update."""
        return self._current_stepper().path

    @property
    def skipped_steps(self) -> int:
        """Returns the number of steps skipped because of non-finite gradients or a spike; saved with the state dict.

        Steps on a CUDA device are counted there, so reading this waits for the device, and so does :meth:`state_dict`.
        """
        return self._counter(COUNTERS[0])

    @property
    def clipped_steps(self) -> int:
        """Returns the number of steps in which the clip by the norm was active; saved with the state dict."""
        return self._counter(COUNTERS[1])

    # -- telemetry ------------------------------------------------------------------------------

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Names the parameters for reports and error messages: ``opt.name_parameters(model.named_parameters())``.

        The method sets the key ``param_names`` of every param group, as torch does for
        ``AdamW(model.named_parameters())``.

        Args:
            named_parameters: Pairs of name and parameter. Parameters that are not optimized are ignored.

        Raises:
            ValueError: A parameter of the optimizer has no name; then nothing is set.
        """
        set_parameter_names(self.param_groups, named_parameters)
        recorder = self._current_stepper().recorder
        if recorder is not None:
            recorder.rename(self.param_groups)

    def _recorder(self, function: str) -> Recorder:
        recorder = self._current_stepper().recorder
        if recorder is None:
            raise RuntimeError(
                f"{function}: expected an optimizer with telemetry, got telemetry=None; leave it at its default"
            )
        return recorder

    @property
    def telemetry(self) -> History | None:
        """Returns the recorded steps as arrays; None under ``telemetry=None``.

        On a CUDA device nothing is waited for: each access starts a copy of the ring, and returns the last copy that
        has arrived. :meth:`report` waits.
        """
        if self._options.telemetry is None:
            return None
        return self._recorder("telemetry").read(self.param_groups, wait=False)

    def report(self) -> Report:
        """Reports what happened in the recorded steps; waits for the device, and hands writers the steps they lack.

        Raises:
            RuntimeError: There is no telemetry.
        """
        recorder = self._recorder("report")
        recorder.hand_over(self.param_groups, wait=True)
        return Report(recorder.read(self.param_groups, wait=True))

    def flush_telemetry(self) -> None:
        """Hands the writers the steps they have not seen; this also happens at the end of the process.

        Raises:
            RuntimeError: There is no telemetry.
        """
        self._recorder("flush_telemetry").hand_over(self.param_groups, wait=True)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the recorded steps: norms, limit, skipped steps, and at level ``"tensor"`` each parameter's norms.

        Args:
            path: The path of the image; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            RuntimeError: There is no telemetry.
            ValueError: No step was recorded yet.
            ImportError: matplotlib is not installed.
        """
        from steadygrad.telemetry.plot import plot_history

        plot_history(self._recorder("plot").read(self.param_groups, wait=True), path)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Puts everything that has to be saved into the param groups while a state dict is made."""
        last = self._flush_to_save()
        make_plain(self.param_groups)
        yield
        if last is not None:
            last.policies.take_back(self.param_groups)

    def _flush_to_save(self) -> Stepper | None:
        """Puts everything into the param groups and returns the stepper; raises if a state cannot be saved."""
        stepper = self._genuine().__dict__.get("_stepper")
        if stepper is None:
            return None
        last: Stepper = stepper.flush_last()
        last.policies.check_saved()
        return last

    def _flush(self, policies: bool = True) -> None:
        stepper = self._genuine().__dict__.get("_stepper")
        if stepper is not None:
            stepper.flush_last(policies)

    def _counter(self, name: str) -> int:
        self._flush(policies=False)
        return max((int(group.get(name, 0)) for group in self.param_groups), default=0)
