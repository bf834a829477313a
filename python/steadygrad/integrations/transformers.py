"""A callback for Hugging Face's Trainer that adds what the stabilized steps saw to its logs.

Sources: transformers 5.23, ``trainer.py`` (``_clip_grad_norm`` and ``_get_grad_norm`` come before ``optimizer.step``,
``log`` before ``on_log``) and ``trainer_callback.py``.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from steadygrad.integrations.readings import (
    name_parameters,
    readings,
    stabilized,
    warn_of_second_clipper,
)


class StabilizerCallback(TrainerCallback):
    """Adds gradient norms, clipped steps and skipped steps to the Trainer's logs.

    The keys are ``steadygrad/grad_norm``, ``steadygrad/skipped_steps`` and ``steadygrad/clipped_steps``, and with
    telemetry ``steadygrad/clipped_norm`` and ``steadygrad/limit``. They appear in ``trainer.state.log_history`` and on
    the console. The Trainer calls reporters such as TensorBoard before a user's callbacks, so reporters see these keys
    only after :meth:`put_first`.

    When training begins, the callback names the optimizer's parameters by the model's names. It warns if
    ``max_grad_norm`` is not 0: its default, 1.0, clips before the optimizer's step, which then sees gradients that were
    already clipped. With ``max_grad_norm=0`` the Trainer still computes a norm for its own ``grad_norm``; if that is
    not finite, the same pass makes all gradients NaN. So ``nonfinite="zero"`` cannot save such a step, and telemetry
    cannot tell which gradient was the first; ``"skip"``, the default, skips the step as always.

    Training works without the callback: just pass ``optimizers=(optimizer, scheduler)`` or
    ``optimizer_cls_and_kwargs``. An optimizer that is not stabilized is ignored.
    """

    def put_first(self, trainer: Trainer) -> StabilizerCallback:
        """Puts this callback before all others of a Trainer, which may or may not have it already.

        Returns:
            This callback.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(other for other in callbacks if other is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Names the parameters, and warns of a second clipper."""
        optimizer = stabilized(kwargs.get("optimizer"))
        if optimizer is None:
            return
        name_parameters(optimizer, kwargs["model"].named_parameters())
        limit = args.max_grad_norm
        if limit:
            warn_of_second_clipper(
                optimizer,
                f"TrainingArguments(max_grad_norm={limit}), whose default is 1.0,",
                "write max_grad_norm=0",
                limit,
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Adds the numbers of the last step to the logs of a training step."""
        optimizer = stabilized(kwargs.get("optimizer"))
        if optimizer is None or "loss" not in logs:
            return
        values = {f"steadygrad/{key}": value for key, value in readings(optimizer).items()}
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hands telemetry's writers the steps that they have not seen."""
        optimizer = stabilized(kwargs.get("optimizer"))
        if optimizer is not None and optimizer.telemetry is not None:
            optimizer.flush_telemetry()
