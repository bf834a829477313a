"""What the study prints when it is done: a table and a sentence per arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .conclusions import short

_NOTHING = "-"


def table(title: str, rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """Lay the rows of a problem out as a table, arm by arm."""
    grid = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # it then fits a terminal of 80 columns
    )
    grid.add_column("arm", max_width=18)
    for header in (
        "learning\nrate",
        "sur-\nvived",
        "\nlearned",
        f"{_two_lines(metric)}\n\N{PLUS-MINUS SIGN} 95 %",
        "steps\nclipped",
        "largest\nnorm",
        "ms per\nstep",
    ):
        grid.add_column(header, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        first = index == 0 or rows[index - 1]["arm"] != row["arm"]
        last = index + 1 == len(rows) or rows[index + 1]["arm"] != row["arm"]
        time, clipped = row["seconds_per_step"], row["clip_rate"]["mean"]
        norm = float(row["max_grad_norm"]["largest"])
        grid.add_row(
            Text(row["arm"] if first else "", style="bold"),
            f"{row['learning_rate']:g}",
            _count(row["survived"]),
            _count(row["learned"]),
            _mean(row["metric"]),
            f"{clipped:.0%}" if clipped else _NOTHING,
            _NOTHING if math.isnan(norm) else f"{norm:.2g}",
            _NOTHING if time is None else f"{1e3 * time['mean']:.2f}",
            end_section=last,
        )
    return grid


def print_report(document: Mapping[str, Any], console: Console) -> None:
    """Print the tables, what their words mean, and a sentence per arm."""
    for experiment in document["experiments"]:
        for problem in experiment["problems"]:
            rows = [row for row in experiment["rows"] if row["problem"] == problem["name"]]
            if rows:
                console.print(table(problem["title"], rows, problem["metric"]["name"]))
    definitions = document["definitions"]
    for term in ("survived", "learned", "exploded"):
        console.print(f"{term}: {definitions[term]}.", style="dim", highlight=False)
    several = sum(len(experiment["problems"]) for experiment in document["experiments"]) > 1
    for experiment in document["experiments"]:
        console.print()
        for finding in experiment["findings"]:
            console.print(finding, markup=False)
        for entry in experiment["conclusions"]:
            name = f"{entry['problem']}, {entry['arm']}" if several else entry["arm"]
            console.print(Text.assemble((f"{name}: ", "bold"), entry["text"]))


def _two_lines(words: str) -> str:
    """Break a long name after its middle."""
    head, _, tail = words.rpartition(" ")
    return f"{head}\n{tail}" if len(words) > 14 else words


def _count(rate: Mapping[str, Any]) -> Text:
    good, runs = rate["count"], rate["of"]
    style = "green" if good == runs else "red" if good == 0 else "yellow"
    return Text(f"{good}/{runs}", style=style)


def _mean(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return _NOTHING
    if value["low"] is None:
        return short(value["mean"])
    return f"{short(value['mean'])} \N{PLUS-MINUS SIGN} {short(value['mean'] - value['low'])}"
