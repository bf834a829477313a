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
    r"""``torch.amp.GradScaler`` that learns from the stabilized step whether gradients overflowed.

    A stabilized step (:class:`steadygrad.Stabilizer`, ``steadygrad.optim``) divides by the scale and counts non-finite
    elements in the pass that takes the norm. So :meth:`step` runs no check of its own before it, and what the step saw
    becomes the ``found_inf`` that :meth:`update` reads:

    .. math:: s \leftarrow s \cdot \text{backoff} \ \text{if found\_inf, else}\ s \cdot \text{growth}
        \ \text{after growth\_interval steps without}

    >>> scaler = sg.GradScaler()
    >>> scaler.scale(loss).backward()
    >>> scaler.step(optimizer)      # unscale, check, norm, clip, update: two passes over memory
    >>> scaler.update()

    Arguments, methods and the state dict are torch's, and so is everything for optimizers that are not stabilized. With
    several optimizers only those whose gradients overflowed are skipped, and the scale is shared, as in torch. On a
    CUDA device nothing waits: ``found_inf`` is taken from the step's outcome there.

    - A scaler's overflow is skipped under every ``nonfinite`` policy, as with torch's scaler: the scale backs off, and
      the next step goes on. The policies ``"zero"``, ``"raise"`` and ``"propagate"`` hold for steps without a scaler.
    - ``found_inf`` is set where the step saw a non-finite gradient after unscaling (and after a penalty that comes
      before the clip), or was told of one.
    - :meth:`unscale_` may be called before :meth:`step`, to read or change gradients; they are not unscaled twice. It
      is a pass of its own, and clipping does not need it.
    - A step without any gradient counts as one that found none, where torch's :meth:`update` raises: a rank
      without gradients follows the others.
    - Gradients in fp16 are taken; only :meth:`unscale_` refuses them, as torch does.

    Source: Micikevicius et al. 2018, "Mixed precision training"; torch/amp/grad_scaler.py.

    Raises:
        RuntimeError: :meth:`step` with a closure, or twice before :meth:`update`; :meth:`unscale_` after
            :func:`steadygrad.accumulate` has summed half-precision gradients apart from ``.grad``.
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients in ``.grad`` by the scale, as torch does; the step then does not."""
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
        """One step of the optimizer, skipped if its gradients overflowed.

        Returns:
            What the optimizer's ``step`` returned; for an optimizer that is not stabilized None if it was skipped.
        """
        if not (self.is_enabled() and isinstance(optimizer, StabilizedOptimizer)):
            return super().step(optimizer, *args, **kwargs)
        closure = args[0] if args else None  # torch refuses it by name only
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
            # Left behind, the scale would be multiplied into the next step's.
            for key in AMP_KEYS:
                vars(optimizer).pop(key, None)
            vars(optimizer).update(before)
            if isinstance(error, TooManySkippedSteps):
                self._hear_from(optimizer)  # the step was decided
            raise
        self._hear_from(optimizer)
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, once every number in it is one that a scaler can go on from.

        Raises:
            TypeError: an entry is no number.
            ValueError: an entry is out of range.
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
        # torch's step calls this for optimizers that unscale by themselves; a stabilized one looks by itself, too.
        if not isinstance(optimizer, StabilizedOptimizer):
            checked: dict[Any, Tensor] = super()._check_inf_per_device(optimizer)
            return checked
        scale = self._get_scale_async()
        assert scale is not None  # step has checked it
        return self._record_found_inf(optimizer, torch.zeros_like(scale))

    def _record_found_inf(
        self, optimizer: torch.optim.Optimizer | StabilizedOptimizer, found_inf: Tensor
    ) -> dict[Any, Tensor]:
        # Where torch's update looks for it.
        recorded = {found_inf.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = recorded
        return recorded
