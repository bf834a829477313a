"""Train a small transformer on the text of Python's documentation, in fp32 and in bf16 with each rounding.

It learns the next byte of CPython's ``pydoc_data.topics`` with AdamW, warm-up and a cosine schedule in 500 steps. The
example needs matplotlib (``pip install 'steadygrad[study]'``) and takes about three minutes::

    python examples/half_precision.py --out out

It prints a table and writes it to ``half_precision.md``, the curves to ``half_precision.png`` and all numbers to
``half_precision.json``. All arms of a seed start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import platform
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import steadygrad as sg

BYTES, CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 256, 64, 16, 96, 4, 2
PEAK_RATE, WARM_UP = 1e-3, 25
HELD_OUT = 32  # number of batches
STEPS_PER_REFRESH = 10

# The options of the model and the Stabilizer for each arm. In fp32 nothing is rounded.
FLOAT32_STATE = {"state_dtype": torch.float32}
ARMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16 naive": (torch.bfloat16, {}),
    "bf16, fp32 state": (torch.bfloat16, FLOAT32_STATE),
    "bf16 + Kahan": (torch.bfloat16, {**FLOAT32_STATE, "rounding": "kahan"}),
    "bf16 + stochastic": (torch.bfloat16, {**FLOAT32_STATE, "rounding": "stochastic"}),
    "bf16 + master": (torch.bfloat16, {**FLOAT32_STATE, "rounding": "master"}),
}

# Curves of several arms coincide, so wide lines are drawn beneath narrow ones.
STYLES: dict[str, dict[str, Any]] = {
    "fp32": {"color": "black", "linewidth": 5.0, "alpha": 0.25},
    "bf16 naive": {"color": "#d62728", "linewidth": 3.0, "alpha": 0.5},
    "bf16, fp32 state": {"color": "#d62728", "linewidth": 1.0, "linestyle": "--"},
    "bf16 + Kahan": {"color": "#2ca02c", "linewidth": 3.0, "alpha": 0.5},
    "bf16 + stochastic": {"color": "#9467bd", "linewidth": 1.2},
    "bf16 + master": {"color": "#1f77b4", "linewidth": 1.0, "linestyle": "--"},
}


class Run(TypedDict):
    """Holds the results of one training run."""

    arm: str
    seed: int
    losses: list[float]
    held_out: float
    state_bytes: float  # bytes of parameter and optimizer state, per parameter
    seconds: float


class Block(nn.Module):
    """Applies attention over the bytes so far, then a feed-forward layer at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``, ``(batch, CONTEXT, WIDTH)``."""
        split = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        mixed: Tensor = x + self.mlp(self.norms[1](x))
        return mixed


class Transformer(nn.Module):
    """Predicts the next byte at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.08)

    def loss(self, text: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of int64 bytes ``(batch, CONTEXT + 1)``."""
        x = self.embedding(text[:, :-1]) + self.position
        logits = self.head(self.blocks(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def read_text() -> Tensor:
    """Return the bytes of the text as int64 numbers."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode()))


def batches(text: Tensor, count: int, seed: int) -> list[Tensor]:
    """Return ``count`` batches of pieces from random places of the text."""
    generator = torch.Generator().manual_seed(seed)
    pieces = text.unfold(0, CONTEXT + 1, 1)
    return [pieces[torch.randint(len(pieces), (BATCH,), generator=generator)] for _ in range(count)]


def rate(step: int, steps: int) -> float:
    """Return the share of the peak learning rate, which rises linearly and falls to 0 in half a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return (1 + math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1))) / 2


def train(arm: str, seed: int, steps: int, show: Callable[[int, float], None]) -> Run:
    """Train one model; call ``show`` with each step and its loss."""
    text = read_text()
    border = len(text) * 9 // 10
    dtype, options = ARMS[arm]
    torch.manual_seed(seed)
    model = Transformer().to(dtype)
    adamw = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99))
    optimizer = sg.Stabilizer(adamw, max_norm=1.0, rounding_seed=seed, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    losses = []
    began = time.perf_counter()
    for step, batch in enumerate(batches(text[:border], steps, seed), start=1):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        show(step, losses[-1])
    seconds = time.perf_counter() - began
    with torch.no_grad():
        held_out = [model.loss(batch).item() for batch in batches(text[border:], HELD_OUT, 0)]
    kept = [*model.parameters(), *(t for state in adamw.state.values() for t in state.values())]
    elements = sum(p.numel() for p in model.parameters())
    state_bytes = sum(t.numel() * t.element_size() for t in kept) / elements
    return Run(
        arm=arm,
        seed=seed,
        losses=losses,
        held_out=statistics.fmean(held_out),
        state_bytes=state_bytes,
        seconds=seconds,
    )


def smoothed(losses: list[float], width: int = 25) -> list[float]:
    """Return for each step the mean of the last ``width`` losses."""
    return [statistics.fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]


COLUMNS = ("arm", "training\nloss", "held-out\nloss", "above\nfp32", "bytes", "seconds")


def rows_of(runs: list[Run]) -> list[list[str]]:
    """Return a row per arm: means over the seeds, and the range of differences to fp32 with the same seed."""
    rows = []
    exact = {run["seed"]: run["held_out"] for run in runs if run["arm"] == "fp32"}
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        above = [run["held_out"] - exact[run["seed"]] for run in own]
        rows.append(
            [
                arm,
                f"{statistics.fmean(smoothed(run['losses'], 50)[-1] for run in own):.3f}",
                f"{statistics.fmean(run['held_out'] for run in own):.3f}",
                " to ".join(dict.fromkeys(f"{value:+.3f}" for value in (min(above), max(above)))),
                f"{own[0]['state_bytes']:.1f}",
                f"{statistics.fmean(run['seconds'] for run in own):.1f}",
            ]
        )
    return rows


def table_of(rows: list[list[str]]) -> Table:
    """Return the table for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_of(rows: list[list[str]]) -> str:
    """Return the same table as Markdown, for a file."""
    header = [column.replace("\n", " ") for column in COLUMNS]
    lines = [header, ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def note_of(steps: int, seeds: int) -> str:
    """Return a note that explains the table's words."""
    return (
        f"{steps} steps, {seeds} seed{'s' if seeds > 1 else ''}. Losses in nats a byte: training over the last 50 "
        f"steps, held out over {HELD_OUT} batches of the text's last tenth, and how far that is above fp32 with the "
        "same seed. Bytes: of a parameter and its optimizer state. Seconds: of a run, on one thread."
    )


def plot(runs: list[Run], path: pathlib.Path) -> None:
    """Plot the losses of the first seed, and the mean over seeds of the differences to fp32."""
    figure = Figure(figsize=(11, 4.8), dpi=140, layout="constrained")
    left, right = figure.subplots(1, 2)
    by_place = {(run["arm"], run["seed"]): smoothed(run["losses"]) for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    for arm, style in STYLES.items():
        left.plot(by_place[arm, seeds[0]], label=arm, **style)
        curves = [
            [a - b for a, b in zip(by_place[arm, seed], by_place["fp32", seed], strict=True)]
            for seed in seeds
        ]
        right.plot([statistics.fmean(values) for values in zip(*curves, strict=True)], **style)
    left.set(xlabel="step", ylabel="training loss, nats a byte (mean of 25 steps)")
    right.set(xlabel="step", ylabel=f"above fp32, mean of {len(seeds)} seed(s)")
    figure.legend(loc="outside lower center", ncols=len(STYLES), frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def run_all(steps: int, seeds: int, console: Console) -> list[Run]:
    """Train every arm with every seed, with progress bars."""
    runs: list[Run] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("all runs", total=seeds * len(ARMS), note="")
        bar = progress.add_task("", total=steps, note="")

        def show(step: int, loss: float) -> None:
            if step % STEPS_PER_REFRESH == 0:
                progress.update(bar, completed=step, note=f"loss {loss:.2f}")

        for seed in range(seeds):
            for arm in ARMS:
                progress.reset(bar, description=f"{arm}, seed {seed}", note="")
                runs.append(train(arm, seed, steps, show))
                progress.advance(total)
        progress.update(bar, visible=False)
    return runs


def main() -> None:
    """Train all arms, and write the plot, the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    given = parser.parse_args()
    if given.steps < 1 or given.seeds < 1:
        parser.error(
            f"expected --steps and --seeds of at least 1, got {given.steps}, {given.seeds}"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # layers this small do not gain from a second thread
    console = Console()
    runs = run_all(given.steps, given.seeds, console)
    record = {
        "versions": {"torch": torch.__version__, "steadygrad": sg.__version__},
        "python": platform.python_version(),
        "runs": runs,
    }
    (given.out / "half_precision.json").write_text(json.dumps(record))
    plot(runs, given.out / "half_precision.png")
    rows, note = rows_of(runs), note_of(given.steps, given.seeds)
    (given.out / "half_precision.md").write_text(f"{markdown_of(rows)}\n{note}\n")
    console.print(table_of(rows))
    console.print(note, style="dim", highlight=False)
    console.print(f"written to {given.out}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
