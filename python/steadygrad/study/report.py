"""What the study prints when it is done: a table and a sentence per arm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .experiments import Experiment
from .summary import Row, conclusions
from .training import LEARNED_TIMES_CHANCE

_NOTHING = "-"


def table(experiment: Experiment, rows: Sequence[Row]) -> Table:
    """Lay the rows out as a table, arm by arm."""
    grid = Table(
        title=experiment.title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # it then fits a terminal of 80 columns
    )
    grid.add_column("arm", no_wrap=True)
    for header in (
        "learning\nrate",
        "survived",
        "learned",
        "test accuracy\nmean (range)",
        "steps\nclipped",
        "largest\nnorm",
        "ms per\nstep",
    ):
        grid.add_column(header, justify="right", no_wrap=True)
    clips = {arm.name for arm in experiment.arms if arm.max_norm is not None}
    for index, row in enumerate(rows):
        first = index == 0 or rows[index - 1].arm != row.arm
        last = index + 1 == len(rows) or rows[index + 1].arm != row.arm
        time = row.seconds_per_step
        grid.add_row(
            Text(row.arm if first else "", style="bold"),
            f"{row.learning_rate:g}",
            _count(row.survived, row.runs),
            _count(row.learned, row.runs),
            _accuracy(row),
            f"{row.clipped_share:.0%}" if row.arm in clips else _NOTHING,
            _NOTHING if math.isnan(row.max_grad_norm) else f"{row.max_grad_norm:.2g}",
            _NOTHING if time is None else f"{1e3 * time:.2f}",
            end_section=last,
        )
    return grid


def print_report(experiment: Experiment, rows: Sequence[Row], console: Console) -> None:
    """Print the table, what its words mean, and a sentence per arm."""
    console.print(table(experiment, rows))
    console.print(
        "survived: the final training loss is finite and below the loss at the start. "
        f"learned: survived, with at least {LEARNED_TIMES_CHANCE:g} times the test accuracy of "
        "guessing. Accuracies are those of the runs that stayed finite; the norm is that of the "
        "gradient before clipping.",
        style="dim",
        highlight=False,
    )
    console.print()
    for arm, sentence in conclusions(rows):
        console.print(Text.assemble((f"{arm}: ", "bold"), sentence))


def _count(good: int, runs: int) -> Text:
    style = "green" if good == runs else "red" if good == 0 else "yellow"
    return Text(f"{good}/{runs}", style=style)


def _accuracy(row: Row) -> str:
    if row.accuracy is None:
        return _NOTHING
    low, high = row.accuracies[0], row.accuracies[-1]
    return f"{_short(row.accuracy)} ({_short(low)}-{_short(high)})"


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")
