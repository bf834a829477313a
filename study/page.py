"""The report of a study, from its records: one HTML page, and Markdown with its charts as SVG files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from . import charts
from . import table as tables
from .record import command_text, write_text
from .table import COLUMNS, NOTHING, Json, figure

HEAT = {
    "heat4": "all, and all of them learned",
    "heat3": "all",
    "heat2": "at least half",
    "heat1": "fewer",
    "heat0": "none",
}
_OVERVIEW = (
    "A setting is a problem and a learning rate. A run is lost when it did not survive, or exploded and did not learn; "
    "otherwise it is kept. A setting is hard when at least half of the baseline's runs are lost in it. The table has "
    "the runs that were kept in the hard settings of each experiment, and how many of them learned; the share of all "
    "hard settings has its 95 % interval. On held-out data a remedy is better or worse in a setting where the 95 % "
    "interval of its difference to the baseline, seed by seed, is above or below 0; only settings count in which every "
    "run of the baseline learned. Of a hundred remedies that change nothing about five would seem to. Every remedy was "
    "tried at one strength."
)
_TWINS = (
    "The same remedy by this package and by torch's own functions, with the same seeds, weights and batches. First "
    "difference: the largest relative one of the batch losses of the first 5 steps; what comes later is chaotic. Time: "
    "torch's seconds per step over ours, above 1 where ours is faster. In brackets: 95 % intervals over the seeds."
)
_SAME = (
    "Remedies whose runs are the same number by number, because what tells them apart never acted, or the runs were "
    "over before it could: "
)
_RESULTS = (
    "Mean on held-out data, with its 95 % interval and the single runs. Pale bars: not every run learned; hatched "
    "bars: not even half of them. Dotted line: guessing; dashed line: threshold of learning. Where lower is better, "
    "bars up to the right edge end beyond it."
)
_CURVES = (
    "Training loss, and below it the gradient norm before the clip, over the steps, on logarithmic scales. Lines are "
    "medians over the seeds, bands go from the smallest to the largest run, crosses mark the first step of a run that "
    "was not finite. Dashed red: the limit of the norm."
)
_STATES = {"interrupted": "was interrupted", "time limit": "ended at its time limit"}


class Cell(str):
    """The text of a cell, and its class in the HTML page."""

    style = ""


class Table(NamedTuple):
    """A table whose first columns are words, and the rest numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def write_pages(documents: Sequence[Json], out: Path) -> list[Path]:
    """Write the report as ``study.html``, and as ``study.md`` with its charts in the folder ``study``.

    Charts that the ``study.md`` that is replaced showed, and the new one does not, are removed.

    Args:
        documents: records, as JSON has them; at least one.
        out: the folder; existing files are replaced.
    """
    report = _report(documents)
    paths, folder = [out / "study.html", out / "study.md"], out / "study"
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    engine.filters["md"] = lambda text: re.sub(r"[\\`*|<\[]|(?<!\w)_", r"\\\g<0>", text)
    html = engine.get_template("page.html.jinja").render(report)
    markdown = engine.get_template("page.md.jinja").render(report, folder=folder.name)
    markdown = re.sub(r" +\n", "\n", re.sub(r"\n{3,}", "\n\n", markdown))
    before = paths[1].read_text("utf-8", "replace") if paths[1].is_file() else ""
    for experiment in report["experiments"]:
        for file, (_, _, drawing) in zip(experiment["files"], experiment["charts"], strict=True):
            write_text(drawing, folder / file)
    for name in set(re.findall(rf"\]\({folder.name}/([\w.-]+\.svg)\)", before + markdown)):
        if f"({folder.name}/{name})" not in markdown:
            (folder / name).unlink(missing_ok=True)
    write_text(html, paths[0])
    write_text(markdown, paths[1])
    return paths


def _report(documents: Sequence[Json]) -> dict[str, Any]:
    experiments = [e for document in documents for e in document["experiments"] if e["runs"]]
    experiments = _named_apart(experiments)
    runs = [tables.runs_of(experiment) for experiment in experiments]
    minutes = round(sum(document["wall_s"] for document in documents) / 60)
    terms: dict[str, str] = {}
    for document in documents:
        terms.update(document["definitions"])
    return {
        "title": "What keeps training steady: remedies compared",
        "lead": f"{_count(len(experiments), 'experiment')}, {_count(sum(map(len, runs)), 'run')}, "
        f"{_count(minutes, 'minute')} of training, {documents[0]['started'][:10]}.",
        "warnings": [
            f"The study of {d['started'][:10]} {_STATES[d['status']]}: its results are partial."
            for d in documents
            if d["status"] in _STATES
        ],
        "heat": HEAT.items(),
        "overview_text": _OVERVIEW,
        "overview": overview(experiments, runs),
        "twins_text": _TWINS,
        "experiments": [_section(e, own) for e, own in zip(experiments, runs, strict=True)],
        "definitions": terms,
        "facts": [fact for document in documents for fact in _facts(document)],
    }


def _named_apart(experiments: Sequence[Json]) -> list[Json]:
    """Number the experiments that have the name of another."""
    names = [experiment["name"] for experiment in experiments]
    counts = [names[:place].count(name) + 1 for place, name in enumerate(names)]
    numbered = [f"{name} {k}" if k > 1 else name for name, k in zip(names, counts, strict=True)]
    return [{**e, "name": name} for e, name in zip(experiments, numbered, strict=True)]


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def overview(experiments: Sequence[Json], runs: Sequence[pd.DataFrame]) -> Table:
    """Lay out a row for each remedy: what it did in the hard settings, and on held-out data."""
    hard = [
        tables.in_settings(own, tables.hard_settings(experiment, own))
        for experiment, own in zip(experiments, runs, strict=True)
    ]
    together = pd.concat([own.astype({"arm": object}) for own in hard]) if hard else pd.DataFrame()
    names = {a["name"]: a["remedy"] for e in experiments for a in tables.remedies(e)}
    rows: list[list[str]] = []
    for name, remedy in names.items():
        of_name = [own[own["arm"] == name] for own in (*hard, together)]
        all_kept = int(of_name[-1]["kept"].sum())
        total = NOTHING
        if count := len(of_name[-1]):
            low, high = tables.wilson(all_kept, count)
            learned = int(of_name[-1]["learned"].sum())
            total = f"{all_kept}/{count} ({low:.2f} to {high:.2f}), learned {learned}"
        found = [tables.held_out(e, own, name) for e, own in zip(experiments, runs, strict=True)]
        better, worse, settings = (sum(column) for column in zip(*found, strict=True))
        compared = f"better in {better}, worse in {worse} of {settings}" if settings else NOTHING
        if any(tables.baseline(e) == name for e in experiments):
            compared = NOTHING
        cells = (_heat(len(own), own["kept"].sum(), own["learned"].sum()) for own in of_name[:-1])
        rows.append([_named(name, remedy), *cells, total, compared])
    head = ("remedy", *(e["name"] for e in experiments), "all hard settings", "on held-out data")
    return Table(head, rows)


def _named(name: str, remedy: str) -> str:
    return name if name == remedy else f"{name} ({remedy})"


def _heat(runs: int, good: int, learned: int) -> Cell:
    if not runs:
        return Cell(NOTHING)
    cell = Cell(f"{good}/{runs}, learned {learned}")
    level = sum((good > 0, 2 * good >= runs, good == runs, good == learned == runs))
    cell.style = f"heat{level}"
    return cell


def _section(experiment: Json, runs: pd.DataFrame) -> dict[str, Any]:
    rows = tables.summarise(experiment, runs)
    drawn = [("On held-out data", _RESULTS, charts.results(experiment, runs, rows), "results")]
    if (curves := charts.curves(experiment, runs)) is not None:
        drawn.append(("Loss and gradient norm", _CURVES, curves, "curves"))
    stem = re.sub(r"[^a-z0-9]+", "-", experiment["name"].lower()).strip("-")
    same = "; ".join(" = ".join(names) for names in tables.same_runs(experiment, runs))
    twins = list(tables.twins(experiment, runs))
    return {
        "name": experiment["name"],
        "title": experiment["title"],
        "about": experiment["about"],
        "problems": [(problem["title"], _described(problem)) for problem in experiment["problems"]],
        "map": _map(experiment, rows),
        "same": f"{_SAME}{same}." if same else "",
        "charts": [(name, text, Drawing(svg)) for name, text, svg, _ in drawn],
        "files": [f"{stem}-{kind}.svg" for *_, kind in drawn],
        "numbers": _numbers(experiment, rows),
        "twins": Table(list(twins[0]) if twins else (), [list(t.values()) for t in twins], 3),
    }


class Drawing(str):
    """SVG, which stands in HTML as it is."""

    def __html__(self) -> str:
        """The element without the declarations of a file of its own."""
        return self[self.index("<svg") :]


def _described(problem: Json) -> str:
    metric = problem["metric"]
    return (
        f"{problem['data']}; {problem['model']}, {problem['parameters']:,} parameters; "
        f"{problem['steps']:,} steps of {problem['batch_size']} examples, {problem['optimizer']}; "
        f"measured by {metric['name']}: guessing gets {figure(metric['guessing'])}, learned from "
        f"{figure(metric['learned'])}, target {figure(metric['target'])}"
    )


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
    """Every row with all that was measured; columns in which nothing was are left out."""
    abouts = {arm["name"]: arm["about"] for arm in experiment["arms"]}
    metrics = dict.fromkeys(problem["metric"]["name"] for problem in experiment["problems"])
    several = len(experiment["problems"]) > 1
    columns = {
        ", ".join(metrics) if name == "metric" else name: [cell(row) for row in rows.itertuples()]
        for name, cell in COLUMNS.items()
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {NOTHING}}
    lines: list[list[str]] = []
    for place, row in enumerate(rows.itertuples()):
        first = [str(row.arm) + (f": {abouts[row.arm]}" if abouts[row.arm] else "")]
        lines.append([*([str(row.problem)] if several else []), *first])
        lines[-1] += [cells[place] for cells in columns.values()]
    head = (*(["problem"] if several else []), "arm", *columns)
    return Table(head, lines, 1 + several)


def _facts(document: Json) -> list[tuple[str, str]]:
    machine: Mapping[str, Any] = document["machine"]
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
