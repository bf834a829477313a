"""Show why the temporal-order problem stops being solvable as sequences get longer.

The program measures, for several lengths, at the start and after 300 steps with clipping at 1, how
the gradient changes on its way back to the marks, and how much the gradients of two batches have in
common. It prints Markdown.

Run it with: python -m benchmarks.gradient_through_time
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import steadygrad as sg
import study

LENGTHS, GAINS, SEEDS, STEPS = (20, 30, 50, 100), (1.0, 1.5), 3, 300
HEADER = (
    "| recurrent gain | length | after | decades to the first mark | to the second "
    "| cosine of two batches | median norm |"
)


def decades_to_the_marks(model: Any, task: study.TemporalOrder) -> tuple[float, ...]:
    """Return the median over sequences of log10 |dL/dh_t| / |dL/dh_T|, at the two marks."""
    inputs, targets = next(task.batches(200, torch.Generator().manual_seed(99)))
    state: Tensor | None = None
    states: list[Tensor] = []
    for step in inputs.unbind(1):
        state = model.recurrent(step[:, None], state)[1]
        state.retain_grad()
        states.append(state)
    cross_entropy(model.output(states[-1][0]), targets, reduction="sum").backward()
    norms = torch.stack([each.grad[0].norm(dim=1) for each in states if each.grad is not None], 1)
    decades = (norms / norms[:, -1:]).log10()
    marks = (inputs[:, :, :2].sum(2) > 0).nonzero()[:, 1].view(-1, 2)
    return tuple(decades.gather(1, marks).median(0).values.tolist())


def agreement(model: nn.Module, task: study.TemporalOrder) -> tuple[float, float]:
    """Return the mean cosine between the gradients of batches of 20, and the median of their norms."""
    batches = task.batches(20, torch.Generator().manual_seed(98))
    gradients = []
    for _ in range(30):
        inputs, targets = next(batches)
        model.zero_grad()
        task.loss(model(inputs), targets).backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    stacked = torch.stack(gradients)
    norms = stacked.norm(dim=1)
    unit = stacked / norms[:, None]
    others = ~torch.eye(len(unit), dtype=torch.bool)
    return (unit @ unit.T)[others].mean().item(), norms.median().item()


def train(model: nn.Module, task: study.TemporalOrder, seed: int) -> None:
    """Take steps of SGD at a learning rate of 0.1 with clipping at 1, as in the experiment."""
    optimizer = sg.optim.SGD(model.parameters(), lr=0.1, max_norm=1.0)
    batches = task.batches(20, torch.Generator().manual_seed(seed))
    for _ in range(STEPS):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()


def main() -> None:
    """Print means over seeds, a row per gain, length and state of training."""
    torch.set_num_threads(1)
    sys.stdout.write(f"{HEADER}\n{'| ---: ' * 7}|\n")
    for gain, length in product(GAINS, LENGTHS):
        task = study.TemporalOrder(length)
        untrained, trained = [], []
        for seed in range(SEEDS):
            spec = study.Recurrent(hidden=50, recurrent_gain=gain)
            model = spec.build(task.inputs, task.outputs, torch.Generator().manual_seed(seed))
            untrained.append((*decades_to_the_marks(model, task), *agreement(model, task)))
            train(model, task, seed)
            trained.append((*decades_to_the_marks(model, task), *agreement(model, task)))
        for steps, found in ((0, untrained), (STEPS, trained)):
            first, second, cosine, norm = torch.tensor(found).mean(0).tolist()
            numbers = f"{first:.1f} | {second:.1f} | {cosine:.2f} | {norm:.2g}"
            sys.stdout.write(f"| {gain:g} | {length} | {steps} steps | {numbers} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
