"""The report of a study: one HTML page, or Markdown, from its records.

A record is the JSON document ``study.json``; several are joined into one report. Every sentence
and number is computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.pages import (
    Block,
    Bullets,
    Cell,
    Document,
    Paragraph,
    Section,
    Table,
    command_text,
    read_record,
    write_text,
)

from . import claims, outcome
from .experiment_section import HEAT_LEGEND, arm_cell, heat, section
from .outcome import Json, listed

SCHEMA = 2
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Where a string is a name, even if it should read like a number.
_NAMES = frozenset({"name", "arm", "problem", "ours", "torch", "exploded_parameter"})


def read_documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read records of studies.

    Args:
        paths: of JSON files, as the study writes them.

    Raises:
        ValueError: a file cannot be read, or is no record of this schema; the message names it.
    """
    return [
        read_record(path, f"a study of schema {SCHEMA}", (SCHEMA,), "experiments") for path in paths
    ]


def write_page(documents: Sequence[Json], path: Path) -> None:
    """Write the report as one self-contained HTML file.

    Args:
        documents: records, as JSON has them; at least one.
        path: where to; an existing file is replaced.
    """
    write_text(report_document(documents).html(), path)


def write_markdown(documents: Sequence[Json], path: Path) -> None:
    """Write the report as Markdown, and its charts as SVG files in a folder beside it.

    Args:
        documents: records, as JSON has them; at least one.
        path: where to; the folder has its name without the ending. Existing files are replaced.
    """
    report_document(documents).write_markdown(path)


def report_document(documents: Sequence[Json]) -> Document:
    """Lay records out as a report."""
    documents = [decoded(document) for document in documents]
    experiments = [experiment for document in documents for experiment in document["experiments"]]
    experiments = _named_apart([experiment for experiment in experiments if experiment["rows"]])
    runs = sum(len(experiment["runs"]) for experiment in experiments)
    minutes = sum(document["wall_s"] for document in documents) / 60
    summary: list[Block] = [Paragraph(warning) for warning in _warnings(documents)]
    sections = []
    if experiments:
        summary.append(Bullets(claims.advice(experiments)))
        sections.append(Section("Remedies and experiments", _overview(experiments)))
        sections.append(claims.section(experiments))
        sections += [section(experiment) for experiment in experiments]
    return Document(
        title="What keeps training steady: remedies compared",
        lead=f"{_count(len(experiments), 'experiment')}, {_count(runs, 'run')}, "
        f"{_count(round(minutes), 'minute')} of training, "
        f"{documents[0]['started'][:10]}.",
        summary=summary,
        sections=[*sections, _definitions(documents)],
        facts=[fact for document in documents for fact in _facts(document)],
    )


def _named_apart(experiments: Sequence[Json]) -> list[Json]:
    """Number the experiments that have the name of another."""
    seen: dict[str, int] = {}
    apart: list[Json] = []
    for experiment in experiments:
        name = experiment["name"]
        seen[name] = seen.get(name, 0) + 1
        apart.append({**experiment, "name": f"{name} {seen[name]}" if seen[name] > 1 else name})
    return apart


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _warnings(documents: Sequence[Json]) -> list[str]:
    states = {"interrupted": "was interrupted", "time limit": "ended at its time limit"}
    return [
        f"The study of {document['started'][:10]} {states[document['status']]}: its results are "
        "partial."
        for document in documents
        if document["status"] in states
    ]


def _overview(experiments: Sequence[Json]) -> list[Block]:
    """A row for each remedy, a column for each experiment, over the hard settings."""
    if not any(outcome.hard_settings(experiment) for experiment in experiments):
        return [Paragraph("No setting was hard."), Paragraph(outcome.MEANING, quiet=True)]
    names = list(dict.fromkeys(outcome.baseline(experiment) for experiment in experiments))
    rows: list[Sequence[str | Cell]] = [
        (listed(names), *(_overview_cell(e, outcome.baseline(e)) for e in experiments))
    ]
    rows += [
        (arm_cell(name, remedy), *(_overview_cell(experiment, name) for experiment in experiments))
        for name, remedy in claims.arms(experiments).items()
    ]
    table = Table(
        ("remedy", *(experiment["name"] for experiment in experiments)),
        rows,
        legend=[(style, text.replace("survived", "kept")) for style, text in HEAT_LEGEND],
        style="heat",
    )
    meaning = "Runs kept in the hard settings of each experiment, and how many learned."
    return [Paragraph(meaning), Paragraph(outcome.MEANING, quiet=True), table]


def _overview_cell(experiment: Json, arm: str) -> Cell:
    found = outcome.tally(experiment, arm, outcome.hard_settings(experiment))
    if not found.runs:
        return Cell("-", style="heat-none")
    style = heat(found.kept, found.learned, found.runs)
    return Cell(f"{found.kept}/{found.runs}", f"learned {found.learned}", style, strong=True)


def _definitions(documents: Sequence[Json]) -> Section:
    terms: dict[str, str] = {}
    for document in documents:
        terms.update(document["definitions"])
    return Section("What the words mean", [Bullets(list(terms.items()))])


def _facts(document: Json) -> list[tuple[str, str]]:
    machine = document["machine"]
    sessions = document["sessions"]
    return [
        ("Started", document["started"]),
        (
            "Wall time",
            f"{document['wall_s']:,.0f} s"
            + (f" over {sessions} sessions" if sessions > 1 else "")
            + ("" if document["status"] == "complete" else f" ({document['status']})"),
        ),
        ("Command", command_text(document["command_line"])),
        (
            "Machine",
            f"{machine['processor']}, {machine['cores']} cores; {machine['system']}; "
            f"processes side by side: {machine['jobs']}, torch threads in each: {machine['threads']}",
        ),
        ("Versions", ", ".join(f"{name} {v}" for name, v in document["versions"].items())),
    ]


def decoded(document: Json) -> dict[str, Any]:
    """Return a record with its non-finite numbers, which JSON holds as strings."""
    experiments = [
        {
            **experiment,
            **{key: _numbers(experiment[key]) for key in ("runs", "rows", "twins")},
            "problems": [
                {**problem, "metric": _numbers(problem["metric"])}
                for problem in experiment["problems"]
            ],
        }
        for experiment in document["experiments"]
    ]
    return {**document, "experiments": experiments}


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: item if key in _NAMES else _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
