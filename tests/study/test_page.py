"""Tests that the report of a study holds all of its record, whatever the outcome of runs is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from study import charts, page, record
from study import table as study_tables
from tests.study.records import BITS, a_problem, a_study, an_arm, an_experiment

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
ARMS = [
    an_arm("none"),
    an_arm("clip 1", "clipping", limit=1.0),
    an_arm("clip 1 (torch)", "clipping", by="torch", twin="clip 1"),
    an_arm("L1 <b>", "penalty"),
]


def mixed(problem: str, arm: str, rate: float, seed: int) -> tuple[str, float] | None:
    if arm == "clip 1 (torch)" and rate == 0.1:
        return None
    if arm.startswith("clip"):
        return ("learned" if seed else "idle"), 0.9 + 0.01 * seed
    return ("lost" if rate == 0.1 else "idle"), 0.1


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return a_study(an_experiment("digits", ARMS, mixed))


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out charts, which take most of the time and on which tables do not depend."""
    monkeypatch.setattr(charts, "results", lambda *_: "<svg/>\n")
    monkeypatch.setattr(charts, "curves", lambda *_: None)


def page_of(folder: Path, *documents: dict[str, Any]) -> ElementTree.Element:
    """Return the HTML page as a tree; check that it is well-formed and needs no other file."""
    html = page.write_pages(documents, folder)[0].read_text(encoding="utf-8")
    doctype, _, rest = html.partition("\n")
    assert doctype == "<!doctype html>"
    tree = ElementTree.fromstring(rest)
    assert not re.search(r"@import|<script|<link|<img|<iframe|url\((?!#)", html)
    hrefs = [value for e in tree.iter() for key, value in e.attrib.items() if key.endswith("href")]
    names = [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]
    assert len(names) == len(set(names))
    assert {href.removeprefix("#") for href in hrefs} <= set(names)
    return tree


def text_of(element: ElementTree.Element) -> str:
    """Return all text within an element, with single spaces."""
    return " ".join(" ".join(element.itertext()).split())


def table_under(tree: ElementTree.Element, heading: str) -> list[list[str]]:
    """Return the rows of the first table after a heading."""
    found = False
    for element in tree.iter():
        found = found or (element.tag in ("h2", "h3") and text_of(element) == heading)
        if found and element.tag == "table":
            return [[text_of(cell) for cell in row] for row in element.iter("tr")]
    raise AssertionError(heading)


# --- tables ---


@pytest.mark.usefixtures("no_charts")
def test_survival_map_and_overview(study: dict[str, Any], tmp_path: Path) -> None:
    easy = an_experiment("easy", ARMS[:2], lambda *_: ("learned", 0.9))
    tree = page_of(tmp_path, study, a_study(easy))
    assert table_under(tree, "Survived and learned") == [
        ["remedy", "learning rate 0.01", "learning rate 0.1"],
        ["none", "5/5, learned 0", "0/5, learned 0"],
        ["clip 1 (clipping)", "5/5, learned 4", "5/5, learned 4"],
        ["L1 <b> (penalty)", "5/5, learned 0", "0/5, learned 0"],
    ]
    assert table_under(tree, "Remedies and experiments") == [
        ["remedy", "digits", "easy", "all hard settings", "on held-out data"],
        ["none", "0/5, learned 0", "-", "0/5 (0.00 to 0.43), learned 0", "-"],
        [
            *("clip 1 (clipping)", "5/5, learned 4", "-", "5/5 (0.57 to 1.00), learned 4"),
            "better in 0, worse in 0 of 2",
        ],
        ["L1 <b> (penalty)", "0/5, learned 0", "-", "0/5 (0.00 to 0.43), learned 0", "-"],
    ]
    styles = [[cell.attrib.get("class") for cell in each.iter("td")] for each in tree.iter("table")]
    assert styles[0][1::5] == ["heat0", "heat3", "heat0"]
    assert list(filter(None, styles[1])) == ["heat3", "heat0", "heat3", "heat3", "heat3", "heat0"]
    assert set(filter(None, styles[4])) == {"heat4"}
    assert "2 experiments, 55 runs, 4 minutes of training, 2026-01-02." in text_of(tree)


@pytest.mark.usefixtures("no_charts")
def test_all_numbers_are_in_the_table(study: dict[str, Any], tmp_path: Path) -> None:
    tree = page_of(tmp_path, study)
    table = table_under(tree, "All numbers")
    assert table[0] == [
        *("arm", "learning rate", "survived", "learned", "test accuracy", "largest norm"),
        *("exploded", "first at step", "first in", "steps to target", "median norm", "MiB"),
    ]  # columns without any measurement are left out
    assert len(table) == 1 + 7
    assert table[2][1:] == [
        "0.1",
        "0/5",
        "0/5",
        "-",
        "inf",
        "5/5",
        "7",
        "2.weight (5)",
        "-",
        "4",
        "2",
    ]
    assert table[3][0] == "clip 1: about clip 1"
    assert table[3][4].startswith("0.92 (0.9") and table[3][9] == "20 (4 of 5)"
    twins = table_under(tree, "Ours beside torch's own")
    assert twins[1] == ["clip 1", "clip 1 (torch)", "learning rate 0.01", "-", "0 (0 to 0)", "-"]


@pytest.mark.usefixtures("no_charts")
def test_several_problems(tmp_path: Path) -> None:
    problems = [a_problem("length 20", BITS), a_problem("length 30", BITS)]
    experiment = an_experiment(
        "rnn", ARMS[:2], mixed, problems=problems, rates=(0.01, 0.02, 0.1), seeds=(0, 1)
    )
    tree = page_of(tmp_path, a_study(experiment))
    names = [f"length {length}, {rate}" for length in (20, 30) for rate in (0.01, 0.02, 0.1)]
    assert table_under(tree, "Survived and learned")[0] == ["remedy", *names]
    assert table_under(tree, "All numbers")[0][:2] == ["problem", "arm"]


@pytest.mark.usefixtures("no_charts")
def test_facts_and_definitions(study: dict[str, Any], tmp_path: Path) -> None:
    text = text_of(page_of(tmp_path, study))
    for expected in (
        "about digits",
        "survived the final loss is finite",
        "Test CPU, 2 cores; Linux-6; processes side by side: 2, torch threads in each: 1",
        "python 3.12.3, torch 2.13.0",
        "Command python -m study",
        "260,310 parameters; 40 steps of 32 examples, SGD, momentum 0.9",
        "guessing gets 0.1, learned from 0.3, target 0.8",
        "2026-01-02T03:04:05+00:00",
    ):
        assert expected in text
    assert "partial" not in text


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("status", ["interrupted", "time limit"])
def test_partial_results_are_called_partial(
    study: dict[str, Any], status: str, tmp_path: Path
) -> None:
    text = text_of(page_of(tmp_path, study | {"status": status, "sessions": 3}))
    assert "its results are partial" in text
    assert f"120 s over 3 sessions ({status})" in text


@pytest.mark.usefixtures("no_charts")
def test_studies_without_runs_or_without_hard_settings(tmp_path: Path) -> None:
    empty = a_study({**an_experiment("digits", ARMS, mixed), "runs": []}, status="interrupted")
    text = text_of(page_of(tmp_path, empty))
    assert "0 experiments, 0 runs" in text and "partial" in text
    page_of(tmp_path, a_study())
    easy = an_experiment("easy", ARMS[:2], lambda *_: ("learned", 0.9))
    tree = page_of(tmp_path, a_study({**easy, "about": ""}, wall_s=61))
    assert table_under(tree, "Remedies and experiments")[1] == ["none", "-", "-", "-"]
    assert "1 experiment, 20 runs, 1 minute of training" in text_of(tree)
    assert all(text_of(paragraph) for paragraph in tree.iter("p"))


# --- charts ---


def texts(drawing: str) -> list[str]:
    return [text_of(text) for text in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def test_bars_have_every_remedy_and_setting(study: dict[str, Any]) -> None:
    (experiment,) = study["experiments"]
    runs = study_tables.runs_of(experiment)
    rows = study_tables.summarise(experiment, runs)
    found = texts(charts.results(experiment, runs, rows))
    assert {"learning rate 0.01", "learning rate 0.1", "none", "clip 1", "L1 <b>"} <= set(found)
    assert found.count("not finite") == 2 and found.count("0.92") == 2
    assert "clip 1 (torch)" not in found
    alone = experiment | {"runs": [run for run in experiment["runs"] if run["seed"] == 1]}
    runs = study_tables.runs_of(alone)
    # Charts without intervals must not warn.
    charts.results(alone, runs, study_tables.summarise(alone, runs))


def test_curves_have_every_remedy_a_limit_and_crosses(study: dict[str, Any]) -> None:
    (experiment,) = study["experiments"]
    runs = study_tables.runs_of(experiment)
    drawing = charts.curves(experiment, runs)
    assert drawing is not None
    assert {"none", "clip 1", "L1 <b>", "training loss", "gradient norm"} <= set(texts(drawing))
    assert "#a02020" in drawing  # the line of the limit
    unlimited = {**experiment, "arms": [{**arm, "limit": None} for arm in experiment["arms"]]}
    assert "#a02020" not in str(charts.curves(unlimited, runs))
    assert charts.curves(experiment, runs.assign(curve=None)) is None


def test_curves_of_many_settings_are_drawn_problem_by_problem() -> None:
    problems = [a_problem("length 20", BITS), a_problem("length 30", BITS)]
    rates = (0.01, 0.02, 0.1)
    experiment = an_experiment("rnn", ARMS[:2], mixed, problems=problems, rates=rates, seeds=(1,))
    found = texts(str(charts.curves(experiment, study_tables.runs_of(experiment))))
    assert {"clip 1, length 20", "none, length 30", "learning rate 0.02"} <= set(found)


def test_drawings_are_the_same_bytes_each_time_and_load_nothing(study: dict[str, Any]) -> None:
    (experiment,) = study["experiments"]
    runs = study_tables.runs_of(experiment)
    one, other = (
        charts.results(experiment, runs, study_tables.summarise(experiment, runs)) for _ in "ab"
    )
    assert one == other
    assert "0.905" in str(charts.results(experiment, *_one_value(experiment, 0.905)))
    links = [
        v for e in ElementTree.fromstring(one).iter() for k, v in e.attrib.items() if "href" in k
    ]
    assert all(link.startswith("#") for link in links)


def _one_value(experiment: dict[str, Any], metric: float) -> tuple[Any, Any]:
    runs = study_tables.runs_of(experiment).assign(metric=metric)
    return runs, study_tables.summarise(experiment, runs)


# --- files ---


def test_markdown_has_the_tables_and_links_to_drawings(
    study: dict[str, Any], tmp_path: Path
) -> None:
    tree = page_of(tmp_path / "docs", study, study)
    assert len([svg for svg in tree.iter(f"{SVG}svg")]) == 4
    text = (tmp_path / "docs" / "study.md").read_text(encoding="utf-8")
    assert text.startswith("# What keeps training steady: remedies compared\n")
    assert "| clip 1 (clipping) | 5/5, learned 4 | 5/5, learned 4 |" in text
    assert "| remedy | digits | digits 2 |" in text
    assert r"L1 \<b>" in text and "<svg" not in text
    assert not re.search(r"\n\n\n|[ \t]\n|[^\n]\n#|\n#.*\n[^\n]", text)
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    names = [f"study/digits-{name}.svg" for name in ("results", "curves", "2-results", "2-curves")]
    assert links == names
    assert {f"study/{file.name}" for file in (tmp_path / "docs" / "study").iterdir()} == set(names)
    for link in links:
        root = ElementTree.fromstring((tmp_path / "docs" / link).read_text(encoding="utf-8"))
        assert root.tag == f"{SVG}svg"


@pytest.mark.usefixtures("no_charts")
def test_records_are_written_and_read_back(study: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    record.write(study, path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == study
    documents = record.read([path, path])
    assert documents == [study, study]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "expected JSON"),
        ("[]", "expected a study of schema 3 or 2, got None"),
        ('{"schema": 1, "experiments": []}', "expected a study of schema 3 or 2, got 1"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "study.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as info:
        record.read([path])
    assert str(path) in str(info.value)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    record.write_text("é", path)
    with pytest.raises(UnicodeEncodeError):
        record.write_text("\ud800", path)
    assert path.read_text(encoding="utf-8") == "é"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    others = tmp_path / "others"
    others.write_text("theirs")
    path.unlink()
    path.symlink_to(others)  # writing must not follow the link
    record.write_text("ours", path)
    assert (others.read_text(), path.read_text()) == ("theirs", "ours")


def test_folders_of_this_machine_are_left_out_of_commands() -> None:
    words = ["/a/python3", "-m", "study", "my file", "/c/own.py"]
    assert record.without_folders(words) == ["python3", "-m", "study", "my file", "own.py"]


# --- colours ---


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_from_what_is_behind_it_in_light_and_dark() -> None:
    style = (ROOT / "study" / "page.html.jinja").read_text()
    schemes = [dict(re.findall(r"--(\w+): #(\w+)", part)) for part in style.split("@media")[:2]]
    assert schemes[0]["paper"] != schemes[1]["paper"]
    for colours in schemes:
        for behind in ("paper", "head"):
            assert contrast(colours["ink"], colours[behind]) > 10
        for ink in ("quiet", "link"):
            assert contrast(colours[ink], colours["paper"]) > 4.5  # WCAG 2, level AA
    heats = re.findall(r"\.heat\d { background: #(\w+); color: #(\w+); }", style)
    assert len(heats) == 5 and all(contrast(*pair) > 4.5 for pair in heats)


def test_curves_differ_in_lightness_and_dashes() -> None:
    looks = [charts._look(place, 5) for place in range(5)]
    order = [luminance(look["color"][1:]) for look in looks]
    assert order == sorted(order, reverse=True)  # lightness tells them apart without colour vision
    assert contrast(looks[0]["color"][1:], "ffffff") > 2.9
    assert len({str(look["ls"]) for look in looks}) == 5


# --- the documentation ---


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    (path,) = (ROOT / "benchmarks" / "results" / "study").glob("*.json")
    (document,) = record.read([path])
    return document


@pytest.mark.usefixtures("no_charts")
def test_the_documentation_has_the_tables_of_the_committed_record(
    committed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check docs/study.md; after a new record, run python -m study --report RECORD --out docs."""
    monkeypatch.setattr(charts, "curves", lambda *_: "<svg/>\n")
    assert (committed["mode"], committed["status"]) == ("full", "complete")
    page.write_pages([committed], tmp_path)
    assert (ROOT / "docs" / "study.md").read_text() == (tmp_path / "study.md").read_text()
    folders = [
        {file.name for file in (where / "study").iterdir()} for where in (ROOT / "docs", tmp_path)
    ]
    assert folders[0] == folders[1]


def test_the_documentation_has_the_charts_of_the_committed_record(
    committed: dict[str, Any],
) -> None:
    experiment = next(e for e in committed["experiments"] if e["name"] == "rnn")
    runs = study_tables.runs_of(experiment)
    drawing = charts.results(experiment, runs, study_tables.summarise(experiment, runs))
    stored = (ROOT / "docs" / "study" / "rnn-results.svg").read_text()
    assert texts(drawing) == texts(stored)
    if f"Matplotlib v{matplotlib.__version__}," in stored:  # other versions may draw differently
        assert drawing == stored
