"""A Lightning callback that logs what the stabilized steps saw.

Sources: lightning 2.6, ``pytorch/callbacks/lr_monitor.py`` (how a callback logs), ``pytorch/plugins/precision``
(``Precision._after_closure`` clips before the optimizer's step, ``MixedPrecision.clip_gradients`` refuses to).
"""

from __future__ import annotations

from typing import Any

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    import pytorch_lightning as pl  # the same library under its older name

from steadygrad.integrations.readings import (
    name_parameters,
    readings,
    stabilized,
    warn_of_second_clipper,
)
from steadygrad.optim.stabilized import StabilizedOptimizer


class StabilizerMonitor(pl.Callback):
    """Logs gradient norms, clipped steps and skipped steps to Lightning's loggers.

    The keys are ``steadygrad/grad_norm``, ``steadygrad/skipped_steps`` and ``steadygrad/clipped_steps``, and with
    telemetry ``steadygrad/clipped_norm`` and ``steadygrad/limit``. ``trainer.callback_metrics`` has the same numbers.
    With several stabilized optimizers the keys contain the number of the optimizer: ``steadygrad/0/grad_norm``.

    When training starts, the callback names the optimizer's parameters by the module's names. It warns if
    ``Trainer(gradient_clip_val=...)`` clips as well: Lightning clips before the optimizer's step, which then sees
    gradients that were already clipped. With ``precision="16-mixed"`` or ``"bf16-mixed"`` Lightning refuses
    ``gradient_clip_val`` at the first step, since a stabilized optimizer divides by the loss scale itself.

    Optimizers that are not stabilized are ignored. Training works without the callback: just return the optimizer from
    ``configure_optimizers``. The callback works with ``lightning.pytorch`` and ``pytorch_lightning``.

    Args:
        every: Number of optimizer steps from one entry in the log to the next, at least 1. None takes the Trainer's
            ``log_every_n_steps``. Default: None.

    Raises:
        ValueError: ``every`` is less than 1.
    """

    def __init__(self, every: int | None = None) -> None:
        super().__init__()
        if every is not None and every < 1:
            raise ValueError(
                f"StabilizerMonitor: every: expected an int >= 1 or None, got {every!r}"
            )
        self.every = every
        self._logged = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Names the parameters, and warns of a second clipper."""
        self._logged = trainer.global_step
        limit = trainer.gradient_clip_val
        for optimizer in _stabilized_optimizers(trainer):
            name_parameters(optimizer, pl_module.named_parameters())
            if limit:
                without = "leave gradient_clip_val out"
                if trainer.precision in ("16-mixed", "bf16-mixed"):
                    without += f", which Lightning refuses with precision={trainer.precision!r}"
                warn_of_second_clipper(
                    optimizer, f"Trainer(gradient_clip_val={limit})", without, limit
                )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the numbers of the last step if enough steps were taken since the last entry."""
        every = self.every or trainer.log_every_n_steps
        if not every or trainer.global_step - self._logged < every:
            return
        self._logged = trainer.global_step
        optimizers = _stabilized_optimizers(trainer)
        values = {
            f"steadygrad/{f'{number}/' if len(optimizers) > 1 else ''}{key}": value
            for number, optimizer in enumerate(optimizers)
            for key, value in readings(optimizer).items()
        }
        trainer.callback_metrics.update(values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Hands telemetry's writers the steps that they have not seen."""
        for optimizer in _stabilized_optimizers(trainer):
            if optimizer.telemetry is not None:
                optimizer.flush_telemetry()


def _stabilized_optimizers(trainer: Any) -> list[StabilizedOptimizer]:
    found = [stabilized(optimizer) for optimizer in trainer.optimizers]
    return [optimizer for optimizer in found if optimizer is not None]
