"""The report of a study: everything in the record is in it, and nothing depends on one outcome."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from study.experiment_charts import figure
from study.page import (
    decoded,
    read_documents,
    report_document,
    write_markdown,
    write_page,
)
from tests.study.pages_read_back import drawings, parsed, tables, text_of
from tests.study.records import BITS, a_problem, a_study, an_arm, an_experiment

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


@pytest.fixture
def study() -> dict[str, Any]:
    experiment = an_experiment("digits", ARMS, mixed)
    mean = {"mean": 0.001, "low": -0.002, "high": 0.004, "values": [0.001] * 5}
    twin = {"problem": "p", "learning_rate": 0.01, "ours": "clip 1", "torch": "clip 1 (torch)"}
    experiment["twins"] = [
        {**twin, "first_difference": 3.1e-7, "metric_difference": mean, "time_ratio": None}
    ]
    return a_study(experiment)


def page_of(*documents: dict[str, Any]) -> Any:
    return parsed(report_document(documents).html())


def table_under(page: Any, heading: str) -> list[list[str]]:
    """The first table of the section with that heading."""
    for section in page.iter("section"):
        if text_of(section[0]) == heading:
            return tables(section)[0]
    raise AssertionError(heading)


def test_survival_map_has_every_remedy_and_learning_rate(study: dict[str, Any]) -> None:
    assert table_under(page_of(study), "Survived and learned") == [
        ["remedy", "learning rate 0.01", "learning rate 0.1"],
        ["none", "5/5 learned 0", "0/5 learned 0"],
        ["clip 1 clipping", "5/5 learned 4", "5/5 learned 4"],
        ["L1 <b> penalty", "5/5 learned 0", "0/5 learned 0"],
    ]


def test_overview_has_the_hard_settings_of_each_experiment(study: dict[str, Any]) -> None:
    easy = an_experiment("easy", ARMS[:2], lambda *_: ("learned", 0.9))
    page = page_of(study, a_study(easy))
    assert table_under(page, "Remedies and experiments") == [
        ["remedy", "digits", "easy"],
        ["none", "0/5 learned 0", "-"],
        ["clip 1 clipping", "5/5 learned 4", "-"],
        ["L1 <b> penalty", "0/5 learned 0", "-"],
    ]
    assert "2 experiments, 55 runs, 4 minutes of training" in text_of(page)


def test_all_numbers_are_in_the_table(study: dict[str, Any]) -> None:
    table = table_under(page_of(study), "All numbers")
    assert table[0] == [
        *("arm", "learning rate", "survived", "learned", "exploded", "test accuracy"),
        *("steps to target", "largest norm", "median norm", "clipped", "ms a step", "MiB"),
        "exploded first in",
    ]
    assert len(table) == 1 + len(study["experiments"][0]["rows"])
    assert table[2][1:6] == ["0.1", "0/5", "0/5", "5/5", "-"]
    assert table[2][7] == "inf" and table[2][12] == "2.weight (5)"
    assert table[3][0] == "clip 1 about clip 1" and table[4][0] == ""
    assert table[3][5].startswith("0.92 0.88") and table[3][6] == "20 (4 of 5)"
    assert table[3][9] == "25 %" and table[3][11] == "2"


def test_twins(study: dict[str, Any]) -> None:
    assert table_under(page_of(study), "Ours beside torch's own")[1] == [
        *("clip 1", "clip 1 (torch)", "learning rate 0.01", "3.1e-7"),
        "0.001 -0.002 to 0.004",
        "-",
    ]


def test_charts(study: dict[str, Any]) -> None:
    svgs = {text_of(svg.find("title")): svg for svg in drawings(page_of(study))}
    assert list(svgs) == [
        *("learning rate 0.01", "learning rate 0.1"),
        "none: 5 of 10 survived, 0 of 10 learned",
        "clip 1: 10 of 10 survived, 8 of 10 learned",
        "L1 <b>: 5 of 10 survived, 0 of 10 learned",
    ]
    bars = svgs["learning rate 0.1"]
    texts = [text_of(text) for text in bars.iter("text")]
    assert texts.count("not finite") == 2 and "0.92" in texts and "clip 1 (torch)" not in texts
    assert [e.attrib["class"] for e in bars.iter("rect")] == ["bar pale"]  # not every run learned
    assert len(list(bars.iter("circle"))) == 5
    lines = svgs["none: 5 of 10 survived, 0 of 10 learned"]
    classes = [e.attrib["class"] for e in lines.iter("path")]
    assert classes.count("curve rank0") == classes.count("curve rank4") == 2
    assert classes.count("cross rank4") == 2 and "cross rank0" not in classes
    limited = svgs["clip 1: 10 of 10 survived, 8 of 10 learned"]
    assert [e.attrib["class"] for e in limited.iter("line")].count("mark dashed") == 1
    assert "mark dashed" not in [e.attrib["class"] for e in lines.iter("line")]


def test_several_problems_and_learning_rates() -> None:
    problems = [a_problem("length 20", BITS), a_problem("length 30", BITS)]
    experiment = an_experiment(
        "rnn", ARMS[:2], mixed, problems=problems, rates=(0.01, 0.02, 0.1), seeds=(0, 1)
    )
    experiment["runs"][0]["curve"] = None
    page = page_of(a_study(experiment))
    table = table_under(page, "Survived and learned")
    assert table[:2] == [
        ["", "length 20", "length 30"],
        ["remedy", *["lr 0.01", "lr 0.02", "lr 0.1"] * 2],
    ]
    titles = [text_of(svg.find("title")) for svg in drawings(page)]
    assert "length 30, learning rate 0.1" in titles
    assert "clip 1, length 20: 6 of 6 survived, 3 of 6 learned" in titles
    assert table_under(page, "All numbers")[0][1] == "problem"
    assert "clip 1, length 30: what clip 1 did." in text_of(page)
    markdown = report_document([a_study(experiment)]).markdown()
    assert "| remedy | length 20, learning rate 0.01 |" in markdown


def test_several_problems_with_one_learning_rate() -> None:
    problems = [a_problem(f"depth {depth}") for depth in (5, 10, 20)]
    experiment = an_experiment("depth", ARMS[:2], mixed, problems=problems, rates=(0.1,))
    page = page_of(a_study(experiment))
    assert table_under(page, "Survived and learned")[0] == [
        "remedy",
        "depth 5",
        "depth 10",
        "depth 20",
    ]
    keys = [text_of(e) for e in page.iter("span") if e.attrib["class"] == "key"]
    assert keys == ["depth 5", "depth 10", "depth 20", "limit of the norm"]


def test_facts_definitions_and_findings(study: dict[str, Any]) -> None:
    text = text_of(page_of(study))
    for expected in (
        "finding of digits",
        "about digits",
        "survived: the final loss is finite",
        "Test CPU, 2 cores; Linux-6; processes side by side: 2, torch threads in each: 1",
        "python 3.12.3, torch 2.13.0",
        "Command python -m study",
        "260,310 parameters; 40 steps of 32 examples, SGD, momentum 0.9",
        "guessing gets 0.1, learned from 0.3, target 0.8",
        "2026-01-02T03:04:05+00:00",
    ):
        assert expected in text
    assert "partial" not in text


@pytest.mark.parametrize("status", ["interrupted", "time limit"])
def test_partial_results_are_called_partial(study: dict[str, Any], status: str) -> None:
    text = text_of(page_of(study | {"status": status, "sessions": 3}))
    assert "its results are partial" in text
    assert f"120 s over 3 sessions ({status})" in text


def test_studies_without_runs(study: dict[str, Any]) -> None:
    study["experiments"][0] |= {"runs": [], "rows": []}
    text = text_of(page_of(study | {"status": "interrupted"}))
    assert "0 experiments, 0 runs" in text and "partial" in text
    assert page_of(a_study()) is not None


def test_an_experiment_without_curves(study: dict[str, Any]) -> None:
    for run in study["experiments"][0]["runs"]:
        run["curve"] = None
    text = text_of(page_of(study))
    assert "Loss and gradient norm" not in text.partition("All numbers")[0]


def test_an_experiment_that_says_nothing_of_itself(study: dict[str, Any]) -> None:
    study["experiments"][0] |= {"about": "", "findings": []}
    page = page_of(study)
    assert all(text_of(e) for name in ("p", "ul") for e in page.iter(name))


def test_where_no_setting_was_hard_there_is_no_map_of_them() -> None:
    page = page_of(a_study(an_experiment("easy", ARMS[:2], lambda *_: ("learned", 0.9)), wall_s=61))
    (section,) = [e for e in page.iter("section") if text_of(e[0]) == "Remedies and experiments"]
    assert not tables(section) and "No setting was hard." in text_of(section)
    assert "1 experiment, 20 runs, 1 minute of training" in text_of(page)


def test_a_single_seed_has_no_intervals() -> None:
    experiment = an_experiment("digits", ARMS, mixed, seeds=(1,))
    svg = drawings(page_of(a_study(experiment)))[0]
    assert not [e for e in svg.iter("path") if e.attrib["class"] == "whisker"]


def test_markdown_has_the_tables_and_links_to_drawings(
    study: dict[str, Any], tmp_path: Path
) -> None:
    write_markdown([study, study], tmp_path / "docs" / "study.md")
    text = (tmp_path / "docs" / "study.md").read_text(encoding="utf-8")
    assert text.startswith("# What keeps training steady: remedies compared\n")
    assert "| clip 1 (clipping) | **5/5** (learned 4) | **5/5** (learned 4) |" in text
    assert "| remedy | digits | digits 2 |" in text
    assert r"L1 \<b>" in text and "<svg" not in text
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    names = [f"study/digits-{name}.svg" for name in ("results", "curves", "2-results", "2-curves")]
    assert links == names
    for link in links:
        drawing = (tmp_path / "docs" / link).read_text(encoding="utf-8")
        root = ElementTree.fromstring(drawing)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(r"https?:(?!//www.w3.org/2000/svg)|@import|<script", drawing)
    assert len(list((tmp_path / "docs" / "study").iterdir())) == 4


def test_page_is_written_and_read_back(study: dict[str, Any], tmp_path: Path) -> None:
    record = tmp_path / "study.json"
    record.write_text(json.dumps(study))
    documents = read_documents([record, record])
    assert documents == [study, study]
    write_page(documents, tmp_path / "new" / "study.html")
    page = parsed((tmp_path / "new" / "study.html").read_text(encoding="utf-8"))
    assert len(list(page.iter("section"))) > 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "expected JSON"),
        ("[]", "expected a study of schema 2, got None"),
        ('{"schema": 1, "experiments": []}', "expected a study of schema 2, got 1"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "study.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as info:
        read_documents([path])
    assert str(path) in str(info.value)


def test_numbers_that_json_has_not(study: dict[str, Any]) -> None:
    (experiment,) = study["experiments"]
    experiment |= {"name": "inf", "title": "nan", "about": "-inf"}
    experiment["runs"][0] |= {"arm": "inf", "final_loss": "-inf", "peak_loss": "nan"}
    (found,) = decoded(study)["experiments"]
    assert [found[key] for key in ("name", "title", "about")] == ["inf", "nan", "-inf"]
    run = found["runs"][0]
    assert (run["arm"], run["final_loss"]) == ("inf", -math.inf) and math.isnan(run["peak_loss"])


def test_figures() -> None:
    values = (0.0, 0.9123, 12.34, 1234.5, 2.5e7, 3.1e-7, math.inf, math.nan, -0.002)
    assert [figure(v) for v in values] == [
        *("0", "0.912", "12.3", "1,234", "2.5e7", "3.1e-7", "inf", "nan", "-0.002")
    ]


def test_the_documentation_is_made_of_the_committed_record(tmp_path: Path) -> None:
    """After a new record: python -m study --report RECORD --out docs."""
    root = Path(__file__).parents[2]
    (record,) = (root / "benchmarks" / "results" / "study").glob("*.json")
    documents = read_documents([record])
    assert (documents[0]["mode"], documents[0]["status"]) == ("full", "complete")
    write_markdown(documents, tmp_path / "study.md")
    assert (root / "docs" / "study.md").read_text() == (tmp_path / "study.md").read_text()
    drawings_of = [
        {file.name: file.read_text() for file in (folder / "study").iterdir()}
        for folder in (root / "docs", tmp_path)
    ]
    assert drawings_of[0] == drawings_of[1]
