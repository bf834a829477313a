"""Takes one stabilized step of a torch optimizer: by a fused kernel if its rule has one, else by its own ``step``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from steadygrad import _kernels, composite
from steadygrad.distributed.dtensors import local_tensor
from steadygrad.distributed.sharding import Sharding, sharding_of
from steadygrad.memory import Outcome
from steadygrad.optim.accumulation import Accumulated
from steadygrad.optim.composite_plan import CompositePlan
from steadygrad.optim.errors import NonfiniteGradientError, nonfinite_message
from steadygrad.optim.hooks import is_watched, run_hooked
from steadygrad.optim.in_place import (
    Closure,
    apply_proximal,
    check_own_numbers,
    dense_grad,
    evaluated,
    evaluates_closure,
    snapshot,
    why_not_fused,
)
from steadygrad.optim.options import COUNTERS, ROUNDED_STEPS, StabilizerOptions
from steadygrad.optim.state import (
    DeviceSteps,
    UpdateRule,
    decision_device,
    is_state_creation,
    scaling,
    slot_of,
)
from steadygrad.telemetry.recorder import Recorder, recorder_of
from steadygrad.telemetry.settings import Telemetry

if TYPE_CHECKING:
    from steadygrad.optim.composite_plan import CompositeOutcome

    AnyOutcome = _kernels.Outcome | Outcome | CompositeOutcome

# The stepper that stepped each optimizer last, by the optimizer's id; the optimizer lives at least as long.
_steppers: WeakValueDictionary[int, Stepper] = WeakValueDictionary()

# Attributes that torch.amp.GradScaler sets for the time of a step.
AMP_KEYS = ("grad_scale", "found_inf")
# Attributes of an optimizer that ask for more than a plain step.
_REQUESTS = frozenset((*AMP_KEYS, "_accumulated"))


@dataclass(frozen=True)
class Request:
    """What a step is to take into account besides its closure.

    Attributes:
        accumulated: Accumulated sums, whose mean is the gradient of the step, or None.
        scaling: The scale of a ``GradScaler`` and the divisor of accumulated sums; None if there is neither.
        skips_nonfinite: Whether non-finite gradients skip the step whatever the options say.
    """

    accumulated: Accumulated | None = None
    scaling: _kernels.Scaling | None = None
    skips_nonfinite: bool = False

    @property
    def sums(self) -> dict[Tensor, Tensor]:
        """Returns the accumulated sums of the gradients that are kept apart from ``.grad``."""
        return {} if self.accumulated is None else self.accumulated.sums

    def hand_over(self) -> None:
        """Moves the sums that the update has used to ``.grad``."""
        if self.accumulated is not None:
            self.accumulated.hand_over()


_PLAIN = Request()


class _EvaluationSkippedError(Exception):
    """Leaves the step of an optimizer that evaluates the model itself; an exception is the only way out of it."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss


class Stepper:
    """Takes the steps of one optimizer; makes a new plan whenever parameters, state or options are exchanged.

    A stepper holds the optimizer by a weak reference, and nothing that refers back to the stepper. So a model and its
    optimizer are freed when the last name for them goes, and not only when the cycle collector runs.

    Args:
        optimizer: Optimizer whose ``param_groups`` and ``state`` are stepped; the stepper's owner keeps it alive.
        options: What a step does besides the update.
        rule: The fused rule, or None for an optimizer that has none.
        base_step: The optimizer's own step, for the in-place path. It takes the optimizer, and the closure if there is
            one, and runs the optimizer's hooks itself.
        runs_hooks: Whether the fused path must run the optimizer's step hooks.

    Attributes:
        outcome: Outcome of the last step; None if the step ended before its outcome was decided.
        last_outcome: Outcome of the last step that did more than create state.
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
        self._limits = options.limits()
        self._rule = rule
        self._base_step = base_step
        self._runs_hooks = runs_hooks
        self._plan: _kernels.Plan | CompositePlan | None = None
        self._refused_by_kernels = (
            False  # True for what torch's operations take, such as penalties of complex parameters.
        )
        self._parameters = 0
        self._sharding: Sharding | None = None
        self._captured_shardings: list[Sharding | None] = []
        self._why_in_place: str | None = None
        self._new_state: dict[Tensor, dict[str, Tensor]] = {}
        self.outcome: AnyOutcome | None = None
        self.last_outcome: AnyOutcome | None = None
        # None as long as the host takes the decisions.
        self._device_steps: DeviceSteps | None = None
        self.policies = options.policy_states()
        self.recorder: Recorder | None = None
        if isinstance(options.telemetry, Telemetry):
            self.recorder = recorder_of(optimizer, options.telemetry)
        self._flushing = RLock()
        self._take_over(optimizer)

    def __del__(self) -> None:
        """Saves counters and policies in the wrapped optimizer, if that outlives its wrapper."""
        if (optimizer := self._optimizer_ref()) and _steppers.get(id(optimizer)) is self:
            self.flush()

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer_ref()
        assert optimizer is not None
        return optimizer

    @property
    def path(self) -> str:
        """Returns ``"fused"`` or ``"in-place: <why>"``."""
        why = self._why()
        return "fused" if why is None else f"in-place: {why}"

    def set_limit(self, key: str, value: float | None, options: StabilizerOptions) -> None:
        """Sets the limit for param groups that were added to the wrapped optimizer directly and have no limit."""
        self._options = options
        self._limits[key] = value

    # -- a step ---------------------------------------------------------------------------------

    def step(self, owner: Any, closure: Closure | None) -> Any:
        """Takes one step for ``owner``, the stabilized optimizer that was called; returns the closure's loss."""
        optimizer = self._optimizer
        if _steppers.get(id(optimizer)) is not self:
            self._take_over(optimizer)
        self.outcome = None
        own: dict[str, Any] = owner.__dict__
        try:
            request = _PLAIN
            if own.keys() & _REQUESTS or owner._finds_inf:
                request = self._request(owner, closure)
            watched = self._runs_hooks and is_watched(optimizer)
            loss = None
            if closure is not None or watched or self._why_in_place is not None:
                loss = self._step_around(optimizer, closure, request, watched)
            elif (self._plan is None or self._run(optimizer, request) is None) and (
                self._fused_anew(optimizer, request) is None
            ):
                self._in_place(optimizer, None, request)
            own.pop("_accumulated", None)
            self._tell()
        except BaseException as error:
            # If a scaler's scale were left here, it would be multiplied into the scale of the next step.
            for key in AMP_KEYS:
                own.pop(key, None)
            if isinstance(error, NonfiniteGradientError):
                self._tell()
            raise
        return loss

    def _request(self, owner: Any, closure: Closure | None) -> Request:
        accumulated: Accumulated = owner.accumulated
        found_inf = owner.__dict__.get("found_inf")
        # torch's scaler looks for infinities in .grad only, and would not lower its scale for infinities in the sums.
        accumulated.check_ready(closure, None if owner._finds_inf else found_inf)
        device = decision_device(self._optimizer.param_groups)
        grad_scale = owner.__dict__.get("grad_scale")
        return Request(
            accumulated,
            scaling(grad_scale, found_inf, accumulated.divisor, device),
            owner._finds_inf,
        )

    def _step_around(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Closure | None,
        request: Request,
        watched: bool,
    ) -> Any:
        """Takes a step that may exchange anything (it has a closure or hooks), or that the optimizer takes itself."""
        self._look_ahead(optimizer, request)
        if self._why_in_place is not None:
            return self._in_place(optimizer, closure, request)
        took = False

        def fused(closure: Closure | None) -> tuple[Any, bool]:
            nonlocal took
            loss = evaluated(closure)
            outcome = self._fused(optimizer, request)
            took = outcome is not None
            return loss, outcome is not None and not outcome.skipped

        loss = run_hooked(optimizer, fused, closure) if watched else fused(closure)[0]
        if not took:
            # The wrapped optimizer's own step runs its pre-hooks a second time; this happens in one step only.
            self._in_place(optimizer, None, request)
        return loss

    def _tell(self) -> None:
        """Lets telemetry look for something to report, once the step's outcome is decided."""
        if self.recorder is not None and self.outcome is not None:
            known = self.outcome.skipped if self._device_steps is None else None
            self.recorder.after_step(self._optimizer.param_groups, known)

    def _take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the stepper that stepped this optimizer before save its counters and policies."""
        previous = _steppers.get(id(optimizer))
        if previous is not None and previous is not self:
            previous.flush()
        _steppers[id(optimizer)] = self

    def flush_last(self, policies: bool = True) -> Stepper:
        """Calls :meth:`flush` of the stepper that stepped the optimizer last; earlier ones have saved all they know."""
        last = _steppers.get(id(self._optimizer), self)
        last.flush(policies)
        return last

    def flush(self, policies: bool = True) -> None:
        """Writes what the device has counted into the param groups, and removes state that no step has used.

        Writes what policies have learnt there too, if ``policies``. Waits for the device if steps were taken on it.
        """
        groups = self._optimizer.param_groups
        with self._flushing:
            if policies:
                self.policies.save(groups)
                if self.recorder is not None:
                    self.recorder.save(groups)
            if self._device_steps is None:
                return
            for counter, steps in zip(COUNTERS, self._device_steps.take_counts(), strict=True):
                if steps:
                    _kernels.count_steps(groups, counter, steps)
            if self._options.storage.is_stochastic:
                steps = self._device_steps.take_rounded_steps()
                _kernels.count_steps(groups, ROUNDED_STEPS, steps)
            self._device_steps.take_back(self._optimizer.state)

    def _why(self) -> str | None:
        # Somebody may have replaced the wrapped optimizer's step; only a wrapper could pass over that.
        return why_not_fused(self._optimizer, self._rule, bypasses_step=self._runs_hooks)

    # -- the plan -------------------------------------------------------------------------------

    def _look_ahead(self, optimizer: torch.optim.Optimizer, request: Request) -> None:
        """Refuses wrong numbers, and makes a plan if none fits the current parameters, state and options."""
        self._check_own_numbers(optimizer)
        plan = self._plan
        if plan is None or not plan.matches(optimizer.param_groups, optimizer.state):
            self._prepare(optimizer, request)

    def _check_own_numbers(self, optimizer: torch.optim.Optimizer) -> None:
        # Only the extension can check the numbers of a rule.
        if self._rule is None or not composite.has_kernels(torch.device("cpu")):
            device = decision_device(optimizer.param_groups)
            for number in range(len(optimizer.param_groups)):
                check_own_numbers(optimizer, number, self._options, device)

    def _prepare(
        self,
        optimizer: torch.optim.Optimizer,
        request: Request,
        why_in_place: str | None = None,
    ) -> None:
        """Makes the plan for the current parameters, state and options.

        ``why_in_place`` is set if a step that cannot be fused has begun.
        """
        groups = optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        goes_through_torch = self._goes_through_torch(params)
        device = None if goes_through_torch else decision_device(groups)
        rule = "none" if self._rule is None else self._rule.name
        clips_units = self._options.unit_clipping is not None
        _kernels.check_param_groups(rule, groups, self._limits, clips_units, device)
        why_in_place = why_in_place or self._why()
        self._options.storage.check_fits(params, why_in_place)
        if self._device_steps is not None:
            self._device_steps.settle(params, optimizer.state)
        self._why_in_place = why_in_place
        self._parameters = len(params)
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
        fused = why_in_place is None
        slots = self._slots(optimizer, request) if fused else [None] * len(params)
        if self._device_steps is not None:
            first = [slot is None or slot.first for slot in slots]
            replaced = None if isinstance(self._plan, CompositePlan) else self._plan
            self._device_steps.prepare(first, replaced)
        if self._plan is not None and self._plan.captured:
            self._captured_shardings.append(self._sharding)
        self._sharding = sharding_of(groups, self._options, self._sharding)
        if goes_through_torch:
            self._plan = CompositePlan(rule, groups, self._options, self._limits)
            return
        self._plan = _kernels.Plan(
            rule, fused, groups, slots, self._options.kernel_options(), self._limits, device
        )
        self._plan.seal(optimizer.state)

    def _goes_through_torch(self, params: list[Tensor]) -> bool:
        """Returns whether torch's operations stabilize the gradients, since no kernel takes these parameters."""
        if composite.why_no_kernel(params) is not None:
            return True
        return self._refused_by_kernels and composite.takes([local_tensor(p) for p in params])

    def _may_go_through_torch(
        self, optimizer: torch.optim.Optimizer, grads: list[Tensor | None]
    ) -> bool:
        """Returns whether torch's operations may take gradients that kernels have just refused."""
        if isinstance(self._plan, CompositePlan) or self._refused_by_kernels:
            return False
        params = [local_tensor(p) for group in optimizer.param_groups for p in group["params"]]
        tensors = [*params, *(grad for grad in grads if grad is not None)]
        # Meta tensors have no numbers to decide by, as the kernels' error says.
        return composite.takes(tensors) and not any(tensor.is_meta for tensor in tensors)

    def _slots(
        self, optimizer: torch.optim.Optimizer, request: Request
    ) -> list[_kernels.Slot | None]:
        assert self._rule is not None
        slots: list[_kernels.Slot | None] = []
        storage, sums = self._options.storage, request.sums
        for group in optimizer.param_groups:
            names = self._rule.state_names(group)
            for param in group["params"]:
                slot, made = slot_of(
                    self._rule,
                    storage,
                    param,
                    group,
                    names,
                    optimizer.state.get(param, {}),
                    has_grad=param.grad is not None or param in sums,
                    on_device=self._device_steps is not None,
                )
                slots.append(slot)
                if made:
                    self._new_state[param] = made
        return slots

    def _run(
        self,
        optimizer: torch.optim.Optimizer,
        request: Request,
        in_place: tuple[list[Tensor | None], bool] | None = None,
    ) -> AnyOutcome | None:
        """Takes the step by one call into the kernels; returns None if nothing was done, since a new plan is needed.

        ``in_place`` is given if the optimizer does the update itself: the gradients, and whether to wait for a device.
        """
        plan, groups, state = self._plan, optimizer.param_groups, optimizer.state
        assert plan is not None
        if in_place is not None:
            grads, read_back = in_place
        else:
            grads = None
            if self._sharding is not None or request.accumulated is not None:
                grads = self._grads(request)
            read_back = self._options.nonfinite == "raise" and not request.skips_nonfinite
        device_steps, sharding, recorder = self._device_steps, self._sharding, self.recorder
        device = None if device_steps is None else device_steps.device
        creates_state = not (state or request.sums) and is_state_creation(
            groups, self._limits, device, recorder is not None and recorder.tells
        )
        clip_rows = skip_row = memory = on_device = nonfinite = None
        reduction = None if sharding is None else sharding.reduction
        if self.policies and not creates_state:
            clip_rows, skip_row = self.policies.rows(groups, device)
            reduction = self.policies.reduction(reduction, groups)
        if device_steps is not None:
            on_device = Outcome(device_steps.device)
            if read_back:
                nonfinite = torch.empty(self._parameters, dtype=torch.int64, device=device)
            if self._options.storage.is_stochastic:
                device_steps.count_rounded_steps(self._options.storage.rounded_steps(groups))
            # An in-place step that reads the outcome back counts on the host; any other step counts on the device.
            counts = in_place is None or not read_back
            memory = device_steps.memory(on_device, counts, nonfinite)
        record = None
        if recorder is not None and not creates_state:
            record = recorder.memory(groups, self._parameters, device)
        try:
            taken = plan.step(
                groups,
                state,
                request.scaling,
                grads,
                reduction,
                clip_rows,
                skip_row,
                record,
                request.skips_nonfinite,
                creates_state,
                memory,
            )
        except TypeError:
            if in_place is not None:
                if not self._may_go_through_torch(optimizer, in_place[0]):
                    raise
                self._refused_by_kernels = True
                return None
            # A gradient may have become sparse since the plan was made.
            self._prepare(optimizer, request)
            if self._why_in_place is None:
                raise
            return None
        if not taken:
            return None
        outcome: AnyOutcome
        known: AnyOutcome
        if on_device is None:
            outcome = known = plan.outcome
            # A step that creates state has zero gradients, but this rank cannot know that of other ranks' gradients.
            creates_state = creates_state and (sharding is None or known.norm == 0)
        else:
            outcome = known = on_device
            if read_back:
                known = on_device.read()
        self.outcome = outcome
        if not creates_state:
            self.last_outcome = outcome
        if not isinstance(known, Outcome) and known.refused:
            counted = plan.nonfinite() if nonfinite is None else nonfinite.tolist()
            indices, total = plan.active_indices(), known.nonfinite
            raise NonfiniteGradientError(nonfinite_message(groups, indices, counted, total))
        if in_place is not None or known.skipped:
            return known
        if self._options.write_grads:
            request.hand_over()
        if self._new_state:
            self._enter_new_state(optimizer)
        # A scheduler made for the wrapped optimizer looks for this mark of the optimizer's own step.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return known

    # -- fused ----------------------------------------------------------------------------------

    def _fused(self, optimizer: torch.optim.Optimizer, request: Request) -> AnyOutcome | None:
        """Takes the step together with the update; returns None if only the optimizer's own step can."""
        outcome = None if self._plan is None else self._run(optimizer, request)
        return self._fused_anew(optimizer, request) if outcome is None else outcome

    def _fused_anew(self, optimizer: torch.optim.Optimizer, request: Request) -> AnyOutcome | None:
        """Takes the step with a new plan, since there is none or it no longer fits; None as in :meth:`_fused`."""
        if self._why_in_place is None:
            self._prepare(optimizer, request)
        if self._why_in_place is not None:
            return None
        outcome = self._run(optimizer, request)
        assert outcome is not None
        return outcome

    def _grads(self, request: Request) -> list[Tensor | None] | None:
        """Returns the gradients to step by if they are not the parameters' ``.grad``, else None."""
        if self._sharding is not None:
            grads = self._sharding.gradients(request.sums)
            if grads is not None:
                return grads
        if request.accumulated is None:
            return None
        return request.accumulated.gradients(self._optimizer.param_groups)

    def _enter_new_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Enters the state that some parameters' first steps have made."""
        assert self._plan is not None
        for index, param in zip(self._plan.active_indices(), self._plan.active(), strict=True):
            if param not in self._new_state:
                continue
            state = self._new_state.pop(param)
            held = optimizer.state[param]
            if self._device_steps is not None:
                self._device_steps.enter(index, param, state, held)
            held.update(state)
        self._plan.seal(optimizer.state)

    # -- in place -------------------------------------------------------------------------------

    def _in_place(
        self, optimizer: torch.optim.Optimizer, closure: Closure | None, request: Request
    ) -> Any:
        """Stabilizes the gradients, then calls the optimizer's own step; returns the closure's loss."""
        if evaluates_closure(optimizer):
            loss, skipped, clipped = self._evaluating(optimizer, closure, request)
        else:
            loss = evaluated(closure)
            outcome = self._stabilize_grads(optimizer, request)
            skipped, clipped = outcome.skipped, outcome.clipped
            if not skipped:
                self._base_step(optimizer)
        groups = optimizer.param_groups
        if not skipped:
            apply_proximal(groups, self._options)
        if skipped or clipped:
            _kernels.count_steps(groups, COUNTERS[0] if skipped else COUNTERS[1], 1)
        return loss

    def _evaluating(
        self, optimizer: torch.optim.Optimizer, closure: Closure | None, request: Request
    ) -> tuple[Any, bool, bool]:
        """Steps an optimizer that evaluates the model itself; returns loss, whether skipped, and whether clipped."""
        if closure is None:
            name = type(optimizer).__name__
            raise TypeError(
                f"step: closure: expected one, as {name} evaluates the model itself, got None"
            )
        clipped = False

        def stabilized_closure() -> Any:
            nonlocal clipped
            loss = evaluated(closure)
            outcome = self._stabilize_grads(optimizer, request)
            if outcome.skipped:
                raise _EvaluationSkippedError(loss)
            clipped = clipped or outcome.clipped
            return loss

        # The optimizer evaluates again in the middle of its step, when it has already moved the parameters.
        restore = snapshot(optimizer)
        try:
            return self._base_step(optimizer, stabilized_closure), False, clipped
        except _EvaluationSkippedError as skipped:
            restore()
            return skipped.loss, True, False
        except BaseException:
            restore()
            raise

    @torch.no_grad()
    def _stabilize_grads(self, optimizer: torch.optim.Optimizer, request: Request) -> AnyOutcome:
        # Hooks and the closure may have exchanged any param group.
        self._check_own_numbers(optimizer)
        options, sums = self._options, request.sums
        grads = None if self._sharding is None else self._sharding.gradients(sums)
        if grads is None:
            grads = [
                dense_grad(param, group, options, sums)
                for group in optimizer.param_groups
                for param in group["params"]
            ]
        # The wrapped step cannot be undone, so the host must know in advance whether to take it.
        read_back = (
            options.nonfinite in ("skip", "raise")
            or request.skips_nonfinite
            or options.skip is not None
            or (request.scaling is not None and request.scaling.found_inf_tensor is not None)
            or evaluates_closure(optimizer)
        )
        apply_proximal(optimizer.param_groups, options, only_check=True)
        outcome = self._run(optimizer, request, (grads, read_back))
        if outcome is None:
            self._prepare(optimizer, request, why_in_place=self._why_in_place)
            return self._stabilize_grads(optimizer, request)
        if not outcome.skipped:
            request.hand_over()
        return outcome
