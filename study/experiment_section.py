"""One experiment of a study as a section of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from study.pages import Block, Bullets, Cell, Facts, Paragraph, Section, Table

from . import outcome
from .experiment_charts import curve_charts, figure, metric_charts, setting_name
from .outcome import Json, Setting, listed

HEAT_LEGEND = (
    ("heat4", "all survived and learned"),
    ("heat3", "all survived"),
    ("heat2", "at least half survived"),
    ("heat1", "fewer survived"),
    ("heat0", "none survived"),
)
_NOTHING = "-"
# Names of metrics that are shares end so.
_SHARES = ("accuracy", "error")


def section(experiment: Json) -> Section:
    """Lay an experiment out: what it is, what was found, its maps, charts and tables."""
    blocks: list[Block] = [Paragraph(experiment["about"])] if experiment["about"] else []
    if experiment["findings"]:
        blocks.append(Bullets([("", finding) for finding in experiment["findings"]]))
    blocks += [
        Facts([(problem["title"], _describe(problem)) for problem in experiment["problems"]]),
        Section("Survived and learned", _survived(experiment)),
        Section("On held-out data", [metric_charts(experiment)]),
    ]
    if (curves := curve_charts(experiment)) is not None:
        blocks.append(Section("Loss and gradient norm", [curves]))
    blocks.append(Section("Remedies, one by one", [Bullets(_conclusions(experiment))]))
    blocks.append(Section("All numbers", [rows_table(experiment)]))
    if experiment["twins"]:
        twins = Section(
            "Ours beside torch's own", [Paragraph(_TWINS, quiet=True), twins_table(experiment)]
        )
        blocks.append(twins)
    return Section(f"{experiment['name']}: {experiment['title']}", blocks)


_MAP = "Runs that survived, of those that were made, and how many learned."
_EQUAL = (
    "Remedies whose runs are the same number by number, because what tells them apart never acted, or "
    "the runs were over before it could:"
)
_TWINS = (
    "The same remedy by this package and by torch's own functions, with the same seeds, weights and "
    "batches. First difference: the largest relative difference of the batch losses of the first 5 "
    "steps; what comes later is chaotic. Time: torch's seconds per step over ours, above 1 where "
    "ours is faster. In brackets: 95 % intervals over the seeds."
)


def _survived(experiment: Json) -> list[Block]:
    blocks: list[Block] = [Paragraph(_MAP), survival_map(experiment)]
    if equal := outcome.equal_runs(experiment):
        groups = "; ".join(listed(names) for names in equal)
        blocks.append(Paragraph(f"{_EQUAL} {groups}.", quiet=True))
    return blocks


def _describe(problem: Json) -> str:
    metric = problem["metric"]
    return (
        f"{problem['data']}; {problem['model']}, {problem['parameters']:,} parameters; "
        f"{problem['steps']:,} steps of {problem['batch_size']} examples, {problem['optimizer']}; "
        f"measured by {metric['name']}: guessing gets {figure(metric['guessing'])}, learned from "
        f"{figure(metric['learned'])}, target {figure(metric['target'])}"
    )


def survival_map(experiment: Json) -> Table:
    """How many runs survived and learned: a row for each remedy, a column for each setting."""
    settings = outcome.settings(experiment)
    rows: list[Sequence[str | Cell]] = []
    for arm in outcome.remedies(experiment):
        cells = (_survival(outcome.row_of(experiment, arm["name"], s)) for s in settings)
        rows.append((arm_cell(arm["name"], arm["remedy"]), *cells))
    many = len(experiment["problems"]) > 1 and len(experiment["learning_rates"]) > 1
    headings = [setting_name(experiment, setting) for setting in settings]
    return Table(
        ("remedy", *headings),
        rows,
        legend=HEAT_LEGEND,
        above=_problems_above(experiment, settings) if many else (),
        below=("remedy", *(f"lr {rate:g}" for _, rate in settings)) if many else (),
        style="heat",
    )


def arm_cell(name: str, remedy: str) -> Cell:
    """An arm at the start of a row, with the remedy that it is one of."""
    return Cell(name, remedy if remedy != name else "")


def _problems_above(experiment: Json, settings: Sequence[Setting]) -> list[Cell]:
    names = [problem["name"] for problem in experiment["problems"]]
    spans = {name: sum(setting[0] == name for setting in settings) for name in names}
    return [Cell(""), *(Cell(name, span=span) for name, span in spans.items() if span)]


def _survival(row: Json | None) -> Cell:
    if row is None:
        return Cell(_NOTHING, style="heat-none")
    survived, learned, runs = row["survived"]["count"], row["learned"]["count"], row["runs"]
    return Cell(
        f"{survived}/{runs}", f"learned {learned}", heat(survived, learned, runs), strong=True
    )


def heat(survived: int, learned: int, runs: int) -> str:
    """The style of a cell of a survival map."""
    if survived == 0:
        return "heat0"
    if survived == runs:
        return "heat4" if learned == runs else "heat3"
    return "heat2" if 2 * survived >= runs else "heat1"


def _conclusions(experiment: Json) -> list[tuple[str, str]]:
    several = len(experiment["problems"]) > 1
    return [
        (f"{c['arm']}, {c['problem']}" if several else c["arm"], c["text"])
        for c in experiment["conclusions"]
    ]


def rows_table(experiment: Json) -> Table:
    """Every row with all that was measured; columns in which nothing was are left out."""
    abouts = {arm["name"]: arm["about"] for arm in experiment["arms"]}
    names = _metric_names(experiment)
    most = 1.0 if all(n.endswith(_SHARES) for n in names.split(", ")) else math.inf
    columns: list[tuple[str, Callable[[Json], str | Cell]]] = [
        ("learning rate", lambda row: f"{row['learning_rate']:g}"),
        ("survived", lambda row: _of(row["survived"])),
        ("learned", lambda row: _of(row["learned"])),
        ("exploded", lambda row: _of(row["exploded"])),
        (names, lambda row: _measured(row["metric"], most=most)),
        ("steps to target", lambda row: _to_target(row["steps_to_target"])),
        ("largest norm", lambda row: _norm(row["max_grad_norm"]["largest"])),
        ("median norm", lambda row: _plain(row["median_grad_norm"])),
        ("clipped", lambda row: _percent(row["clip_rate"])),
        ("skipped", lambda row: _percent(row["skip_rate"])),
        ("ms a step", lambda row: _measured(row["seconds_per_step"], 1e3)),
        ("MiB", lambda row: _mebibytes(row["memory_bytes"])),
        ("exploded first in", lambda row: _parameters(row["exploded_parameters"])),
    ]
    if len(experiment["problems"]) > 1:
        columns.insert(0, ("problem", lambda row: str(row["problem"])))
    rows: list[Sequence[str | Cell]] = []
    filled = {
        heading
        for heading, cell in columns
        if any(cell(row) != _NOTHING for row in experiment["rows"])
    }
    columns = [column for column in columns if column[0] in filled]
    named = None
    for row in experiment["rows"]:
        about = abouts.get(row["arm"], "")
        first = Cell(row["arm"], about) if row["arm"] != named else Cell("")
        named = row["arm"]
        rows.append((first, *(cell(row) for _, cell in columns)))
    kinds = "".join("t" if name in ("problem", "exploded first in") else "n" for name, _ in columns)
    return Table(("arm", *(name for name, _ in columns)), rows, f"t{kinds}", style="numbers")


def twins_table(experiment: Json) -> Table:
    """Our remedies beside torch's: differences and times."""
    rows = [
        (
            twin["ours"],
            twin["torch"],
            setting_name(experiment, (twin["problem"], twin["learning_rate"])),
            _first_difference(twin["first_difference"]),
            _mean(twin["metric_difference"]),
            _mean(twin["time_ratio"]),
        )
        for twin in experiment["twins"]
    ]
    headings = ("ours", "torch's", "setting", "first difference", "ours - torch's", "time")
    return Table(headings, rows, "tttnnn")


def _metric_names(experiment: Json) -> str:
    return ", ".join(dict.fromkeys(p["metric"]["name"] for p in experiment["problems"]))


def _of(rate: Json) -> str:
    return f"{rate['count']}/{rate['of']}"


def _mean(mean: Json | None, factor: float = 1.0) -> str | Cell:
    if mean is None:
        return _NOTHING
    centre = figure(factor * mean["mean"])
    if mean["low"] is None or mean["high"] is None:
        return centre
    return Cell(centre, f"{figure(factor * mean['low'])} to {figure(factor * mean['high'])}")


def _measured(mean: Json | None, factor: float = 1.0, most: float = math.inf) -> str | Cell:
    """A mean of what is never negative and at most ``most``: Student's interval knows nothing of that."""
    if mean is None or mean["low"] is None or min(mean["values"]) < 0:
        return _mean(mean, factor)
    ends = {"low": max(mean["low"], 0.0), "high": min(mean["high"], most)}
    return _mean({**mean, **ends}, factor)


def _norm(value: float) -> str:
    return _NOTHING if math.isnan(value) else figure(value)


def _plain(mean: Json | None) -> str:
    return _NOTHING if mean is None else figure(mean["mean"])


def _percent(mean: Json | None) -> str:
    return _NOTHING if mean is None or not mean["mean"] else f"{100 * mean['mean']:.3g} %"


def _to_target(found: Json) -> str:
    if not found["reached"]:
        return _NOTHING
    median = f"{found['median']:,.0f}"
    return median if found["reached"] == found["of"] else f"{median} ({_of_count(found)})"


def _of_count(found: Json) -> str:
    return f"{found['reached']} of {found['of']}"


def _mebibytes(count: int | None) -> str:
    return _NOTHING if count is None else f"{count / 2**20:.3g}"


def _parameters(found: Json) -> str:
    """The parameter in which most of the runs exploded first."""
    if not found:
        return _NOTHING
    name, runs = max(found.items(), key=lambda item: item[1])
    return f"{name} ({runs})"


def _first_difference(value: float | None) -> str:
    return _NOTHING if value is None else "none" if value == 0 else figure(value)
