"""One stabilized step of a torch optimizer: fused where its rule has a kernel, else around its own ``step``."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks

from steadygrad import _kernels
from steadygrad.distributed.sharding import Sharding, sharding_of
from steadygrad.memory import Outcome, is_number_on
from steadygrad.optim.accumulated import Accumulated
from steadygrad.optim.closures import Closure, evaluated, evaluates_closure, snapshot
from steadygrad.optim.device_steps import (
    DeviceReport,
    DeviceSteps,
    Scaling,
    decision_device,
    scaling,
)
from steadygrad.optim.eligibility import why_not_fused
from steadygrad.optim.hooked_step import hooked
from steadygrad.optim.in_place import apply_proximal, check_own_numbers, dense_grad
from steadygrad.optim.interruptions import (
    CannotFuse,
    NonfiniteGradientError,
    StepSkipped,
    nonfinite_message,
)
from steadygrad.optim.options import COUNTERS, StabilizerOptions
from steadygrad.optim.param_storage import ROUNDED_STEPS
from steadygrad.optim.rule import UpdateRule
from steadygrad.optim.slots import slot_of
from steadygrad.optim.state_creation import is_state_creation
from steadygrad.telemetry.recorder import Recorder, recorder_of
from steadygrad.telemetry.settings import Telemetry

# The last one to step each optimizer, by the id of the optimizer, which lives at least as long as the stepper.
_steppers: WeakValueDictionary[int, Stepper] = WeakValueDictionary()


class Stepper:
    """Takes steps for one optimizer; its plan is rebuilt whenever parameters, state or options are exchanged.

    It holds the optimizer by a weak reference, and nothing that refers back to the stepper: a model and its optimizer
    are freed when the last name for them goes, and not when the cycle collector runs.

    Args:
        optimizer: whose ``param_groups`` and ``state`` are stepped; whoever keeps the stepper keeps it alive.
        options: what a step does besides the update.
        rule: the fused rule, or None for an optimizer that has none.
        base_step: the optimizer's own step, for the in-place path, which is given the optimizer, and the closure if
            there is one; it runs the optimizer's hooks itself.
        runs_hooks: whether the fused path must run the optimizer's step hooks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        options: StabilizerOptions,
        rule: UpdateRule | None,
        base_step: Callable[..., Any],
        runs_hooks: bool,
    ) -> None:
        self._optimizer_ref = ref(optimizer)
        self._options = options
        self._rule = rule
        self._base_step = base_step
        self._runs_hooks = runs_hooks
        self._hooked_step = hooked(self._fused) if runs_hooks else None
        self._plan: _kernels.Plan | None = None
        self._sharding: Sharding | None = None
        self._captured_shardings: list[Sharding | None] = []
        self._why_in_place: str | None = None
        self._structure: tuple[object, ...] = ()
        self._new_state: dict[Tensor, dict[str, Tensor]] = {}
        self._scaling = Scaling()
        # Both set for the time of a step: what it is the mean of; "skip" where a GradScaler takes it.
        self.accumulated = Accumulated()
        self.nonfinite: str = options.nonfinite
        self.report: _kernels.StepReport | DeviceReport | None = None
        self._clipped = False
        self._creates_state = False
        # The groups' numbers where neither a closure nor a hook can have changed anything since they were read.
        self._known_numbers: list[tuple[float, ...]] | None = None
        self.grad_norm: float | Outcome | None = None
        # Only where decisions stay on the device.
        self._device_steps: DeviceSteps | None = None
        self.policies = options.policy_states()
        self.recorder: Recorder | None = None
        if isinstance(options.telemetry, Telemetry):
            self.recorder = recorder_of(optimizer, options.telemetry)
        self._flushing = RLock()
        self._take_over()

    def __del__(self) -> None:
        """Leaves what it knows with a wrapped optimizer that outlives its wrapper."""
        if (optimizer := self._optimizer_ref()) and _steppers.get(id(optimizer)) is self:
            self.flush()

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer_ref()
        assert optimizer is not None
        return optimizer

    @property
    def path(self) -> str:
        """``"fused"`` or ``"in-place: <why>"``."""
        why = self._why()
        return "fused" if why is None else f"in-place: {why}"

    def step(self, closure: Closure | None, grad_scale: Any, found_inf: Any) -> Any:
        """One step; returns the closure's loss."""
        self._take_over()
        self.report = None
        device, divisor = decision_device(self._optimizer.param_groups), self.accumulated.divisor
        self._scaling = scaling(grad_scale, found_inf, divisor, device)
        numbers = self._group_numbers(device)  # refuses bad ones before a closure or a hook runs
        if self._is_stale(device):
            self._prepare()
        self._known_numbers = None if closure is not None or self._has_pre_hooks() else numbers
        self._clipped = False
        try:
            take = self._in_place if self._why_in_place is not None else self._fused_or_in_place
            loss = take(closure)
        except StepSkipped as skipped:
            self._count(COUNTERS[0])
            return skipped.loss
        if self._clipped:
            self._count(COUNTERS[1])
        return loss

    def tell(self) -> None:
        """After a step that was decided: telemetry looks whether there is somebody to tell."""
        if self.recorder is not None and self.report is not None:
            known = self.report.skipped if self._device_steps is None else None
            self.recorder.after_step(self._optimizer.param_groups, known)

    def _fused_or_in_place(self, closure: Closure | None) -> Any:
        try:
            fused = self._fused if self._hooked_step is None else self._hooked_step
            return fused(self._optimizer, closure)
        except CannotFuse as found:
            # The wrapped optimizer's pre-hooks run again with its own step, this one time.
            try:
                self._in_place(None)
            except StepSkipped:
                raise StepSkipped(found.loss) from None
            return found.loss

    def _take_over(self) -> None:
        """Lets the last stepper of the same optimizer say all it knows."""
        previous = _steppers.get(id(self._optimizer))
        if previous is not self:
            if previous is not None:
                previous.flush()
            _steppers[id(self._optimizer)] = self

    def _count(self, counter: str, steps: int = 1) -> None:
        groups = self._optimizer.param_groups
        total = max([group.get(counter, 0) for group in groups], default=0) + steps
        for group in groups:
            group[counter] = total

    def flush_last(self, policies: bool = True) -> Stepper:
        """:meth:`flush` of whichever stepper stepped the optimizer last; the ones before it have said all they know."""
        last = _steppers.get(id(self._optimizer), self)
        last.flush(policies)
        return last

    def flush(self, policies: bool = True) -> None:
        """Brings what the device has counted to the param groups, and takes back state that no step has used.

        And what policies have learnt, unless told not to. Waits for the device, once steps have been taken there.
        """
        with self._flushing:
            if policies:
                self.policies.save(self._optimizer.param_groups)
                if self.recorder is not None:
                    self.recorder.save(self._optimizer.param_groups)
            if self._device_steps is None:
                return
            for counter, steps in zip(COUNTERS, self._device_steps.take_counts(), strict=True):
                if steps:
                    self._count(counter, steps)
            if self._options.storage.is_stochastic:
                self._count(ROUNDED_STEPS, self._device_steps.take_rounded_steps())
            self._device_steps.take_back(self._optimizer.state)

    def _has_pre_hooks(self) -> bool:
        own = self._optimizer._optimizer_step_pre_hooks
        return self._runs_hooks and bool(own or _global_optimizer_pre_hooks)

    def _why(self) -> str | None:
        # Only a wrapper would pass over a step that somebody put in the wrapped optimizer's place.
        return why_not_fused(self._optimizer, self._rule, bypasses_step=self._runs_hooks)

    # -- the plan -------------------------------------------------------------------------------

    def _current_structure(self, device: torch.device | None) -> tuple[object, ...]:
        groups = self._optimizer.param_groups
        of_rule = None if self._rule is None else self._rule.structure(groups)
        return (device, self.nonfinite, of_rule)

    def _is_stale(self, device: torch.device | None) -> bool:
        plan = self._plan
        if plan is None or self._structure != self._current_structure(device):
            return True
        optimizer = self._optimizer
        # The in-place path neither reads nor writes the optimizer's state.
        state = optimizer.state if self._why_in_place is None else {}
        return not plan.matches(optimizer.param_groups, state)

    def _prepare(self) -> None:
        optimizer = self._optimizer
        params = [param for group in optimizer.param_groups for param in group["params"]]
        why_in_place = self._why()
        self._options.storage.check_fits(params, why_in_place)
        if self._device_steps is not None:
            self._device_steps.settle(params, optimizer.state)
        device = decision_device(optimizer.param_groups)
        self._structure = self._current_structure(device)
        self._why_in_place = why_in_place
        self._new_state = {}
        if (
            device is not None
            and device.type == "cuda"
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError(
                "step: expected at least one step before a graph is captured (a captured first step would start anew "
                "in each replay), got a first step, or one after parameters or state were exchanged, inside a capture"
            )
        if device is None or self._device_steps is None or self._device_steps.device != device:
            self.flush()
            self._device_steps = None if device is None else DeviceSteps(device)
        fused = self._rule is not None and self._why_in_place is None
        slots = [
            self._slot(param, group) if fused else None
            for group in optimizer.param_groups
            for param in group["params"]
        ]
        if self._device_steps is not None:
            first = [slot is None or slot[2] for slot in slots]
            self._device_steps.prepare(first, self._plan)
        if self._plan is not None and self._plan.captured:
            self._captured_shardings.append(self._sharding)
        self._sharding = sharding_of(optimizer.param_groups, self._options, self._sharding)
        self._plan = _kernels.Plan(
            self._rule.name if fused and self._rule is not None else "none",
            [group["params"] for group in optimizer.param_groups],
            slots,
            {**self._options.kernel_options(), "nonfinite": self.nonfinite},
        )
        self._plan.seal(optimizer.state if fused else {})

    def _slot(self, param: Tensor, group: dict[str, Any]) -> _kernels.Slot | None:
        assert self._rule is not None
        slot, made = slot_of(
            self._rule,
            self._options.storage,
            param,
            group,
            self._optimizer.state.get(param, {}),
            has_grad=param.grad is not None or param in self.accumulated.sums,
            on_device=self._device_steps is not None,
        )
        if made:
            self._new_state[param] = made
        return slot

    # -- fused ----------------------------------------------------------------------------------

    def _fused(self, optimizer: torch.optim.Optimizer, closure: Closure | None = None) -> Any:
        loss = evaluated(closure)
        # Hooks and the closure may have exchanged anything.
        if self._known_numbers is None and self._is_stale(
            decision_device(self._optimizer.param_groups)
        ):
            self._prepare()
        try:
            report = self._run_plan()
            if report is None:  # first gradients of parameters that have no state yet
                self._prepare()
                report = self._run_plan()
        except TypeError:
            # Gradients may have become sparse since the plan was made.
            self._prepare()
            if self._why_in_place is None:
                raise
        if self._why_in_place is not None:
            raise CannotFuse(loss)
        assert report is not None and self._plan is not None
        self._record(report, loss)
        if self._options.write_grads:
            self.accumulated.hand_over()
        if self._options.storage.is_stochastic and self._device_steps is None:
            self._count(ROUNDED_STEPS, 0 if self._creates_state else 1)
        if self._new_state:
            for index, param in zip(self._plan.active_indices(), self._plan.active(), strict=True):
                if param not in self._new_state:
                    continue
                state = self._new_state.pop(param)
                held = optimizer.state[param]
                if self._device_steps is not None:
                    self._device_steps.enter(index, param, state, held)
                held.update(state)
            self._plan.mark_first_steps_done()
            self._plan.seal(optimizer.state)
        # A scheduler made for the wrapped optimizer looks for this mark of its own step.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return loss

    def _run_plan(self) -> _kernels.StepReport | DeviceReport | None:
        if self._why_in_place is not None:
            return None
        grads = self._sharded_gradients()
        if grads is None:
            grads = self.accumulated.gradients(self._optimizer.param_groups)
        return self._run(grads, read_back=self.nonfinite == "raise")

    def _sharded_gradients(self) -> list[Tensor | None] | None:
        sharding = self._sharding
        return None if sharding is None else sharding.gradients(self.accumulated.sums)

    def _run(
        self, grads: list[Tensor | None] | None, read_back: bool
    ) -> _kernels.StepReport | DeviceReport | None:
        assert self._plan is not None
        groups = self._optimizer.param_groups
        numbers = self._known_numbers
        if numbers is None:
            numbers = self._group_numbers(decision_device(groups))
        rounded_steps = self._options.storage.rounded_steps(groups)
        device = None if self._device_steps is None else self._device_steps.device
        rows = None if self._creates_state else self.policies.rows(groups, device)
        of_processes = None if self._sharding is None else self._sharding.reduction
        reduction = self.policies.reduction(of_processes, rows, groups)
        record = None
        if self.recorder is not None and not self._creates_state:
            record = self.recorder.memory(groups, device)
        if self._device_steps is None:
            return self._plan.step(
                numbers, *self._scaling.numbers, grads, rounded_steps, reduction, rows, record
            )
        rates = [g["lr"] if is_number_on(g.get("lr"), device) else None for g in groups]
        if self._options.storage.is_stochastic:
            self._device_steps.count_rounded_steps(rounded_steps)
        return self._device_steps.run(
            self._plan, numbers, rates, self._scaling, grads, read_back, reduction, rows, record
        )

    def _group_numbers(self, device: torch.device | None) -> list[tuple[float, ...]]:
        optimizer = self._optimizer
        listed: list[dict[str, float]] = []
        for i, group in enumerate(optimizer.param_groups):
            where = f"step: param_groups[{i}]: "
            if self._rule is None:
                check_own_numbers(optimizer, i, self._options, device)
            if is_number_on(group.get("lr"), device):
                group = {**group, "lr": 0.0}  # read by the kernels
            numbers = self._rule.numbers(group, where) if self._rule is not None else {}
            listed.append({**numbers, **self._options.group_numbers(group, where)})
        # It comes before there is any.
        self._creates_state = not (optimizer.state or self.accumulated.sums) and is_state_creation(
            optimizer.param_groups,
            listed,
            device,
            self.recorder is not None and self.recorder.tells,
        )
        if self._creates_state:
            for numbers in listed:
                numbers.update(l1=0.0, l2=0.0, max_norm=math.inf)
        fields = _kernels.GROUP_FIELDS
        return [tuple([numbers.get(field, 0.0) for field in fields]) for numbers in listed]

    # -- in place -------------------------------------------------------------------------------

    def _in_place(self, closure: Closure | None) -> Any:
        if not evaluates_closure(self._optimizer):
            loss = evaluated(closure)
            self._stabilize_grads(loss)
            self._base_step(self._optimizer)
            apply_proximal(self._optimizer.param_groups, self._options)
            return loss
        if closure is None:
            name = type(self._optimizer).__name__
            raise TypeError(
                f"step: closure: expected one, as {name} evaluates the model itself, got None"
            )

        def stabilized_closure() -> Any:
            loss = evaluated(closure)
            self._stabilize_grads(loss)
            return loss

        # It evaluates again in the middle of its step, where it has already moved.
        restore = snapshot(self._optimizer)
        try:
            loss = self._base_step(self._optimizer, stabilized_closure)
        except BaseException:
            restore()
            raise
        apply_proximal(self._optimizer.param_groups, self._options)
        return loss

    @torch.no_grad()
    def _stabilize_grads(self, loss: Any) -> None:
        if self._known_numbers is None and self._is_stale(
            decision_device(self._optimizer.param_groups)
        ):
            self._prepare()
        assert self._plan is not None
        grads = self._sharded_gradients()
        if grads is None:
            grads = [
                dense_grad(param, group, self._options, self.accumulated.sums)
                for group in self._optimizer.param_groups
                for param in group["params"]
            ]
        # The wrapped step cannot be taken back, so whether to take it must be known.
        read_back = (
            self.nonfinite in ("skip", "raise")
            or self._options.skip is not None
            or self._scaling.found_inf_tensor is not None
            or evaluates_closure(self._optimizer)
        )
        apply_proximal(self._optimizer.param_groups, self._options, only_check=True)
        report = self._run(grads, read_back)
        assert report is not None
        self._record(report, loss)
        self.accumulated.hand_over()

    # -- the outcome ----------------------------------------------------------------------------

    def _record(self, report: _kernels.StepReport | DeviceReport, loss: Any) -> None:
        self.report = report
        if self._sharding is not None and self._creates_state and isinstance(report.norm, float):
            self._creates_state = (
                report.norm == 0
            )  # only this rank's gradients are known to be zero
        if not self._creates_state:
            self.grad_norm = report.norm
        if report.refused:
            assert self._plan is not None
            indices = self._plan.active_indices()
            raise NonfiniteGradientError(
                nonfinite_message(self._optimizer.param_groups, indices, report)
            )
        if report.skipped:
            raise StepSkipped(loss)
        self._clipped = self._clipped or report.clipped
