"""A callback of Hugging Face's Trainer that adds what the stabilized steps saw to its logs.

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
    """Adds gradient norms, clipped and skipped steps to the Trainer's logs.

    As ``steadygrad/grad_norm``, ``steadygrad/skipped_steps`` and ``steadygrad/clipped_steps``, and with telemetry
    ``steadygrad/clipped_norm`` and ``steadygrad/limit``. They are in ``trainer.state.log_history`` and on the console.
    Reporters such as TensorBoard, which the Trainer puts before the callbacks of its caller, see them after
    :meth:`put_first`.

    When training begins it names the optimizer's parameters by the model's names, and warns if ``max_grad_norm`` is
    not 0: its default, 1.0, clips before the optimizer's step, which then sees what is left. With ``max_grad_norm=0``
    the Trainer still takes a norm for its own ``grad_norm``; where that is not finite, the pass makes all gradients
    NaN. So ``nonfinite="zero"`` cannot save a step there, and telemetry cannot tell whose gradient it was;
    ``"skip"``, the default, skips the step as ever.

    Training needs no callback: pass ``optimizers=(optimizer, scheduler)`` or ``optimizer_cls_and_kwargs``. An optimizer
    that is not stabilized is passed over.
    """

    def put_first(self, trainer: Trainer) -> StabilizerCallback:
        """Puts this callback before all others of a Trainer, whether it has it already or not.

        Returns:
            This callback.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(other for other in callbacks if other is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Names parameters, and looks for a second clipper."""
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
        """Adds to the logs of a training step."""
        optimizer = stabilized(kwargs.get("optimizer"))
        if optimizer is None or "loss" not in logs:
            return
        values = {f"steadygrad/{key}": value for key, value in readings(optimizer).items()}
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hands telemetry's writers what they have not seen."""
        optimizer = stabilized(kwargs.get("optimizer"))
        if optimizer is not None and optimizer.telemetry is not None:
            optimizer.flush_telemetry()
