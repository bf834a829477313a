"""Train a small GPT-2 on the text of Python's documentation by Hugging Face's Trainer with a stabilized optimizer.

The model has random weights and its tokens are bytes, so nothing is downloaded. It needs transformers and matplotlib
(``pip install 'steadygrad[transformers,plot]'``) and takes about half a minute::

    python examples/trainer_text.py --out out

It prints the losses and a report, and writes the report to ``trainer_text.txt``, a plot to ``trainer_text.png`` and the
Trainer's log to ``trainer_text.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pydoc_data.topics
import tempfile

import torch
from rich.console import Console
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import steadygrad as sg
from steadygrad.integrations.transformers import StabilizerCallback

CONTEXT = 64


class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Holds pieces of ``CONTEXT`` bytes, int64."""

    def __init__(self) -> None:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        whole = len(text) // CONTEXT * CONTEXT
        self.pieces = torch.tensor(list(text[:whole])).view(-1, CONTEXT)

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one piece in the form that the model takes."""
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def train(steps: int, folder: str) -> Trainer:
    """Train; return the Trainer, which knows the results."""
    torch.manual_seed(0)
    sizes = {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes))
    optimizer = sg.Stabilizer(
        torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99)),
        clip=sg.ClipZScore(),
        skip=sg.SkipSpikes(),
        telemetry="tensor",
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        max_grad_norm=0.0,  # the optimizer clips
        logging_steps=max(steps // 10, 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Text(), optimizers=(optimizer, schedule))
    StabilizerCallback().put_first(trainer)
    trainer.train()
    return trainer


def main() -> None:
    """Train, print the report, and write the report, the plot and the log."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    given = parser.parse_args()
    if given.steps < 2:
        parser.error(f"expected --steps of at least 2, got {given.steps}")
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # Layers this small do not gain from a second thread.
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(given.steps, folder)
    optimizer = trainer.optimizer.optimizer  # The Trainer holds accelerate's wrapper of it.
    report = str(optimizer.report())
    console.print(report, highlight=False)
    (given.out / "trainer_text.txt").write_text(f"{report}\n")
    (given.out / "trainer_text.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    optimizer.plot(given.out / "trainer_text.png")
    console.print(f"written to {given.out}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
