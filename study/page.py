"""Render the report of a study from its records, as an HTML page and as Markdown with SVG charts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from . import charts
from . import table as tables
from .record import without_folders, write_text
from .table import COLUMNS, NOTHING, Json, figure


class Cell(str):
    """Holds the text of a cell; ``style`` is its class in the HTML page."""

    style = ""


class Table(NamedTuple):
    """Holds a table; its first ``words`` columns are text, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def write_pages(documents: Sequence[Json], out: Path) -> list[Path]:
    """Write the report as ``study.html``, and as ``study.md`` with charts in the folder ``study``.

    Charts that an earlier ``study.md`` showed and the new one does not show are removed.

    Args:
        documents: Records as JSON values; at least one.
        out: Folder to write to; existing files are replaced.
    """
    report = _report(documents)
    paths, folder = [out / "study.html", out / "study.md"], out / "study"
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    engine.filters["figure"] = figure
    engine.filters["command"] = lambda words: shlex.join(without_folders(words))
    engine.filters["md"] = lambda text: re.sub(r"[\\`*|<\[]|(?<!\w)_", r"\\\g<0>", text)
    html = engine.get_template("page.html.jinja").render(report)
    markdown = engine.get_template("page.md.jinja").render(report, folder=folder.name)
    markdown = re.sub(r" +\n", "\n", re.sub(r"\n{3,}", "\n\n", markdown))
    before = paths[1].read_text("utf-8", "replace") if paths[1].is_file() else ""
    drawn = {each["file"]: each["svg"] for e in report["experiments"] for each in e["charts"]}
    for name, svg in drawn.items():
        write_text(svg, folder / name)
    for name in set(re.findall(rf"\]\({folder.name}/([\w.-]+\.svg)\)", before)) - set(drawn):
        (folder / name).unlink(missing_ok=True)
    write_text(html, paths[0])
    write_text(markdown, paths[1])
    return paths


def _report(documents: Sequence[Json]) -> dict[str, Any]:
    experiments = [e for document in documents for e in document["experiments"] if e["runs"]]
    names = [experiment["name"] for experiment in experiments]
    for place, name in enumerate(names):  # a repeated name gets a number
        if count := names[:place].count(name):
            experiments[place] = {**experiments[place], "name": f"{name} {count + 1}"}
    runs = [tables.runs_of(experiment) for experiment in experiments]
    terms: dict[str, str] = {}
    for document in documents:
        terms.update(document["definitions"])
    return {
        "title": "What keeps training steady: remedies compared",
        "documents": documents,
        "runs": sum(map(len, runs)),
        "overview": overview(experiments, runs),
        "experiments": [_section(e, own) for e, own in zip(experiments, runs, strict=True)],
        "definitions": terms,
    }


def overview(experiments: Sequence[Json], runs: Sequence[pd.DataFrame]) -> Table:
    """Return a row for each remedy: its results in the hard settings, and on held-out data."""
    hard = [
        tables.in_settings(own, tables.hard_settings(experiment, own))
        for experiment, own in zip(experiments, runs, strict=True)
    ]
    names = {a["name"]: a["remedy"] for e in experiments for a in tables.remedies(e)}
    baselines = {tables.baseline(experiment) for experiment in experiments}
    rows: list[list[str]] = []
    for name, remedy in names.items():
        counts = [
            (len(one), int(one["kept"].sum()), int(one["learned"].sum()))
            for one in (own[own["arm"] == name] for own in hard)
        ]
        count, kept, learned = (sum(column) for column in zip(*counts, strict=True))
        total = compared = NOTHING
        if count:
            low, high = tables.wilson(kept, count)
            total = f"{kept}/{count} ({low:.2f} to {high:.2f}), learned {learned}"
        found = [tables.held_out(e, own, name) for e, own in zip(experiments, runs, strict=True)]
        better, worse, settings = (sum(column) for column in zip(*found, strict=True))
        if settings and name not in baselines:
            compared = f"better in {better}, worse in {worse} of {settings}"
        rows.append([_named(name, remedy), *(_heat(*each) for each in counts), total, compared])
    head = ("remedy", *(e["name"] for e in experiments), "all hard settings", "on held-out data")
    return Table(head, rows)


def _named(name: str, remedy: str) -> str:
    return name if name == remedy else f"{name} ({remedy})"


def _heat(runs: int, good: int, learned: int) -> Cell:
    if not runs:
        return Cell(NOTHING)
    cell = Cell(f"{good}/{runs}, learned {learned}")
    cell.style = f"heat{sum((good > 0, 2 * good >= runs, good == runs, good == learned == runs))}"
    return cell


def _section(experiment: Json, runs: pd.DataFrame) -> dict[str, Any]:
    rows = tables.summarise(experiment, runs)
    stem = re.sub(r"[^a-z0-9]+", "-", experiment["name"].lower()).strip("-")
    drawn = (
        ("results", "On held-out data", charts.results(experiment, runs, rows)),
        ("curves", "Loss and gradient norm", charts.curves(experiment, runs)),
    )
    twins = list(tables.twins(experiment, runs))
    return {
        "name": experiment["name"],
        "title": experiment["title"],
        "about": experiment["about"],
        "problems": experiment["problems"],
        "map": _map(experiment, rows),
        "same": "; ".join(" = ".join(names) for names in tables.same_runs(experiment, runs)),
        "charts": [
            {"kind": kind, "title": title, "svg": svg, "file": f"{stem}-{kind}.svg"}
            for kind, title, svg in drawn
            if svg is not None
        ],
        "numbers": _numbers(experiment, rows),
        "twins": Table(list(twins[0]) if twins else (), [list(t.values()) for t in twins], 3),
    }


def _map(experiment: Json, rows: pd.DataFrame) -> Table:
    """How many runs survived and learned: a row for each remedy, a column for each setting."""
    settings = [setting for setting, _ in rows.groupby(tables.SETTING, observed=True)]
    found = {(row.arm, row.problem, row.learning_rate): row for row in rows.itertuples()}
    lines: list[list[str]] = []
    for arm in tables.remedies(experiment):
        own: list[Any] = [found.get((arm["name"], *setting)) for setting in settings]
        cells = [_heat(r.runs, r.survived, r.learned) if r else Cell(NOTHING) for r in own]
        lines.append([_named(arm["name"], arm["remedy"]), *cells])
    return Table(("remedy", *(tables.setting_name(experiment, *s) for s in settings)), lines)


def _numbers(experiment: Json, rows: pd.DataFrame) -> Table:
    """Return all numbers of all rows, without columns in which nothing was measured."""
    abouts = {arm["name"]: f": {arm['about']}" for arm in experiment["arms"] if arm["about"]}
    metrics = ", ".join(dict.fromkeys(p["metric"]["name"] for p in experiment["problems"]))
    several = len(experiment["problems"]) > 1
    found = pd.DataFrame({"problem": rows["problem"], "arm": rows["arm"]}).astype(str)
    found["arm"] = [arm + abouts.get(arm, "") for arm in found["arm"]]
    for name, cell in COLUMNS.items():
        cells = [cell(row) for row in rows.itertuples()]
        if set(cells) != {NOTHING}:
            found[metrics if name == "metric" else name] = cells
    found = found if several else found.drop(columns="problem")
    return Table(list(found), found.to_numpy().tolist(), 1 + several)
