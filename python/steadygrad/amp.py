"""Loss scaling for mixed precision: ``torch.amp.GradScaler`` without its pass over the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadygrad.arguments import checked_count, checked_number
from steadygrad.optim.stabilized import StabilizedOptimizer
from steadygrad.optim.step import AMP_KEYS
from steadygrad.telemetry.recorder import TooManySkippedSteps


class GradScaler(torch.amp.GradScaler):
    r"""Scales the loss as ``torch.amp.GradScaler`` does, and learns from the optimizer's step what overflowed.

    A stabilized step (:class:`steadygrad.Stabilizer`, ``steadygrad.optim``) divides by the scale and counts non-finite
    elements in the pass that computes the norm. So :meth:`step` makes no check of its own before it, and the count
    becomes the ``found_inf`` that :meth:`update` reads:

    .. math:: s \leftarrow s \cdot \text{backoff} \ \text{if found\_inf, else}\ s \cdot \text{growth}
        \ \text{after growth\_interval steps without}

    Examples:
        >>> scaler = sg.GradScaler()
        >>> scaler.scale(loss).backward()
        >>> scaler.step(optimizer)      # unscale, check, norm, clip, update: two passes over memory
        >>> scaler.update()

    Arguments, methods and the state dict are torch's. For an optimizer that is not stabilized everything is as in
    torch. With several optimizers the scale is shared, and only those whose gradients overflowed skip their step, as in
    torch. On a CUDA device nothing waits: ``found_inf`` is computed there from the step's outcome.

    - A step whose scaled gradients overflowed is skipped under every ``nonfinite`` policy, as with torch's scaler: the
      scale backs off, and training goes on with the next step. The policies ``"zero"``, ``"raise"`` and
      ``"propagate"`` apply to steps without a scaler.
    - ``found_inf`` is set if the step saw a non-finite gradient after unscaling (and after a penalty that is added
      before the clip), or if the optimizer was told of one.
    - :meth:`unscale_` may be called before :meth:`step`, to read or change gradients; they are not unscaled twice. It
      is a pass of its own, and clipping does not need it.
    - A step without any gradient counts as one without overflow, where torch's :meth:`update` raises. So a rank without
      gradients keeps the same scale as the other ranks.
    - Gradients in fp16 are accepted; only :meth:`unscale_` refuses them, as torch does.

    Source: Micikevicius et al. 2018, "Mixed precision training"; torch/amp/grad_scaler.py.

    Raises:
        RuntimeError: :meth:`step` was called with a closure, or twice before :meth:`update`; or :meth:`unscale_` was
            called after :func:`steadygrad.accumulate` had summed half-precision gradients apart from ``.grad``.
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients in ``.grad`` by the scale, as torch does; the step then does not divide again."""
        if (
            self.is_enabled()
            and isinstance(optimizer, StabilizedOptimizer)
            and optimizer.accumulated.sums
        ):
            raise RuntimeError(
                "unscale_: optimizer: expected gradients in .grad, got half-precision ones that steadygrad.accumulate "
                "sums in float32; step() unscales them"
            )
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Steps the optimizer, or skips the step if its gradients overflowed.

        Returns:
            What the optimizer's ``step`` returned. For an optimizer that is not stabilized, None if it was skipped.
        """
        if not (self.is_enabled() and isinstance(optimizer, StabilizedOptimizer)):
            return super().step(optimizer, *args, **kwargs)
        closure = args[0] if args else None  # torch's scaler refuses closure= by its name only
        if closure is not None:
            raise RuntimeError(
                "step: closure: expected none while the GradScaler is enabled, "
                f"got {type(closure).__name__}"
            )
        before = {key: vars(optimizer)[key] for key in AMP_KEYS if key in vars(optimizer)}
        try:
            with optimizer.finding_inf():
                result = super().step(optimizer, **kwargs)
        except BaseException as error:
            # A scale left in these attributes would multiply into the scale of the next step.
            for key in AMP_KEYS:
                vars(optimizer).pop(key, None)
            vars(optimizer).update(before)
            if isinstance(error, TooManySkippedSteps):
                self._hear_from(optimizer)  # the step was already decided when it raised
            raise
        self._hear_from(optimizer)
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a scaler's state as torch does, after a check that every number in it is in range.

        Raises:
            TypeError: An entry is not a number.
            ValueError: An entry is out of range.
        """
        for key, value in state_dict.items() if self.is_enabled() else ():
            where = f"GradScaler.load_state_dict: {key}"
            if key in ("growth_interval", "_growth_tracker"):
                checked_count(where, value, low=1 if key == "growth_interval" else 0)
            elif key in ("scale", "growth_factor", "backoff_factor") and not (
                checked_number(where, value) > 0
            ):
                raise ValueError(f"{where}: expected a finite number > 0, got {value!r}")
        super().load_state_dict(state_dict)

    def _hear_from(self, optimizer: StabilizedOptimizer) -> None:
        found_inf = optimizer.found_nonfinite()
        if found_inf is not None:
            self._record_found_inf(optimizer, found_inf)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[Any, Tensor]:
        # torch's step calls this for optimizers that unscale gradients themselves; a stabilized step also checks them.
        if not isinstance(optimizer, StabilizedOptimizer):
            checked: dict[Any, Tensor] = super()._check_inf_per_device(optimizer)
            return checked
        scale = self._get_scale_async()
        assert scale is not None  # torch's step has created it
        return self._record_found_inf(optimizer, torch.zeros_like(scale))

    def _record_found_inf(
        self, optimizer: torch.optim.Optimizer | StabilizedOptimizer, found_inf: Tensor
    ) -> dict[Any, Tensor]:
        # torch's update looks for found_inf in this entry.
        recorded = {found_inf.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = recorded
        return recorded
