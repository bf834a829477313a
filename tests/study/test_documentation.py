"""Tests that every number that the documentation takes from the study is in the committed record."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from study import record, table
from study.transformer import TRANSFORMER_SGD

ROOT = Path(__file__).parents[2]


class Kept(NamedTuple):
    """Counts the runs of an arm in the hard settings of all experiments."""

    kept: int
    runs: int
    learned: int
    exploded: int


class Facts:
    """Computes facts from the committed record."""

    def __init__(self) -> None:
        (path,) = (ROOT / "benchmarks" / "results" / "study").glob("*.json")
        self.experiments = {e["name"]: e for e in record.read([path])[0]["experiments"]}
        self.runs = {name: table.runs_of(e) for name, e in self.experiments.items()}
        self.settings = sum(
            own.groupby(table.SETTING, observed=True).ngroups for own in self.runs.values()
        )
        settings = {n: table.hard_settings(e, self.runs[n]) for n, e in self.experiments.items()}
        self.hard_settings = sum(map(len, settings.values()))
        hard = [table.in_settings(own, settings[name]) for name, own in self.runs.items()]
        self.hard = pd.concat([own.astype({"arm": object}) for own in hard])

    def kept(self, arm: str) -> Kept:
        own = self.hard[self.hard["arm"] == arm]
        counts = (int(own[name].sum()) for name in ("kept", "learned", "exploded"))
        kept, learned, exploded = counts
        return Kept(kept, len(own), learned, exploded)

    def held_out(self, arm: str) -> tuple[int, ...]:
        found = [table.held_out(e, self.runs[name], arm) for name, e in self.experiments.items()]
        return tuple(sum(column) for column in zip(*found, strict=True))

    def of(self, experiment: str, problem: str, arm: str, rate: float = 0.1) -> pd.DataFrame:
        runs = table.in_settings(self.runs[experiment], [(problem, rate)])
        return runs[runs["arm"] == arm]


@pytest.fixture(scope="module")
def facts() -> Facts:
    return Facts()


def says(page: str, sentences: list[str], heading: str = "", until: str = "") -> None:
    """Check that a page has each sentence and, under a heading, no other numbers."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    if heading:
        start = text.index(heading) + len(heading)
        text = text[start : text.index(until, start)]
    for sentence in sentences:
        assert sentence in text, sentence
        text = text.replace(sentence, "", 1)
    if heading:
        assert re.findall(r"[^\n]{20}\d[^\n]{0,20}", text) == []


def test_what_the_runs_say(facts: Facts) -> None:
    k = facts.kept
    none, clip, he, norm = k("none"), k("clip 1"), k("clip 1 + He init"), k("batch norm")
    z, relative = k("ClipZScore capped"), k("ClipRelative")
    adaptive, percentile = k("ClipAdaptive"), k("ClipPercentile")
    few = [k(n) for n in ("L1", "L2", "weight decay", "dropout", "warmup", "SkipSpikes")]
    better, worse, total = facts.held_out("clip 1")
    still = k("torch's init")
    assert none.learned == still.exploded == still.learned == 0
    assert he.kept == he.learned == he.runs
    in_all = [name for name in set(facts.hard["arm"]) if k(name).runs == none.runs]
    assert len(in_all) > 3 and all(k(name).learned < none.runs for name in in_all)
    text = {arm: facts.of("char", "char", arm, 4.0)["metric"].mean() for arm in TEXT}
    (problem,) = facts.experiments["char"]["problems"]
    runs = sum(len(own) for own in facts.runs.values())
    assert f"## What {runs:,} runs say" in (ROOT / "docs" / "experiments.md").read_text()
    says(
        "docs/experiments.md",
        [
            f"In {facts.hard_settings} of {facts.settings} settings at least half of the runs are "
            f"lost without a remedy: {none.kept} of {none.runs} are kept",
            f"norm at 1 keeps {clip.kept} of {clip.runs} runs, and {clip.learned} learn.",
            f"all {he.learned} of {he.runs} learn.",
            f"Batch norm keeps {norm.kept} of {norm.runs}, and {norm.learned} learn.",
            f"tried in all {facts.hard_settings} settings",
            f"cap keeps {z.kept} of {z.runs} runs ({z.learned} learn) and ClipRelative "
            f"{relative.kept} of {relative.runs} ({relative.learned} learn)",
            f"ClipAdaptive keeps {adaptive.kept} of {adaptive.runs}, "
            f"ClipPercentile {percentile.kept} of {percentile.runs}.",
            "L1 {} of {} runs, L2 {} of {}, weight decay {} of {}, dropout {} of {}, warmup {} of {}, "
            "skipping of spikes alone {} of {}.".format(*(n for each in few for n in each[:2])),
            "He's keeps {} of {} runs ({} learn).".format(*k("He init")),
            f"none of the {still.runs} learns",
            "in {0} of {2} settings; clipping at 1 has better ones in".format(
                *facts.held_out("batch norm")
            ),
            f" {better} of {total} and worse ones in {worse}.",
            "at learning rate 4, a limit of .25 ends at {:.2f} bits per character, 1 at {:.2f}, and "
            "5 at {:.2f}, which is worse than guessing ({:.2f})".format(
                *(text[arm] for arm in TEXT[:3]), problem["metric"]["guessing"]
            ),
            f"ClipRelative ends at {text['ClipRelative']:.2f}.",
        ],
        f"## What {runs:,} runs say",
        "## Where",
    )


TEXT = ("clip .25", "clip 1", "clip 5", "ClipRelative")


def test_where_temporal_order_stops_being_solvable(facts: Facts) -> None:
    def solved(length: int, arm: str) -> pd.DataFrame:
        return facts.of("rnn", f"temporal order {length}", arm)

    steps = {length: solved(length, "clip 1")["steps_to_target"] for length in (20, 30)}
    none = [solved(length, "none")["learned"].sum() for length in (20, 30)]
    clip = [solved(length, "clip 1")["learned"].sum() for length in (20, 30, 50)]
    assert steps[20].min() == steps[20].max()
    assert all(
        solved(n, arm)["nonfinite_step"].isna().all()
        for n in (20, 30)
        for arm in ("none", "clip 1")
    )
    fifty = {
        a: solved(50, a)["learned"].sum()
        for a in ("ClipRelative", "ClipPercentile", "ClipAdaptive")
    }
    assert fifty["ClipPercentile"] == fifty["ClipAdaptive"] == 1
    says(
        "docs/experiments.md",
        [
            f"Over {len(steps[20])} seeds, length 20: {none[0]} solved without clipping, {clip[0]} with the "
            f"norm clipped at 1, all of them at the first look, after {steps[20].max():.0f} steps.",
            f"Length 30: {none[1]} and {clip[1]}, after {steps[30].min():.0f} to {steps[30].max():,.0f} steps.",
            f"no longer suffices: {clip[2]} of {len(solved(50, 'clip 1'))} are solved.",
            f"ClipRelative {fifty['ClipRelative']} of 10, ClipPercentile and ClipAdaptive 1 each",
        ],
    )


def test_readme_and_decisions(facts: Facts) -> None:
    k = facts.kept
    clip, he, norm = k("clip 1"), k("clip 1 + He init"), k("batch norm")
    named = [k(name) for name in ("L1", "L2", "weight decay", "dropout")]
    says(
        "README.md",
        [
            f"{sum(len(own) for own in facts.runs.values()):,} runs over 10 seeds. In "
            f"{facts.hard_settings} settings in which plain SGD fails, clipping at 1 kept {clip.kept} of "
            f"{clip.runs} runs from diverging, of which only {clip.learned} learned",
            f"beside it all {he.learned} learned that were tried, and batch norm kept {norm.kept} of {norm.runs}.",
            f"kept {sum(each.kept for each in named)} of {sum(each.runs for each in named)}.",
        ],
    )
    none, clipped = (
        facts.of("mnist", "CNN", arm, 0.01).set_index("seed") for arm in ("none", "clip 1")
    )
    worse = none["metric"] - clipped["metric"]
    means = [table.mean_of(values)[:3] for values in (none["metric"], clipped["metric"], worse)]
    ours, torchs = (
        np.array(list(facts.of("digits", "digits", arm, 0.01)["first_losses"]), dtype=float)
        for arm in ("batch norm", "batch norm (torch)")
    )
    apart = np.abs(ours - torchs) / np.abs(torchs)
    short = [[f"{value:.2f}".removeprefix("0") for value in mean] for mean in means]
    says(
        "docs/decisions.md",
        [
            f"ten seeds have a standard deviation of {none['metric'].std():.2f}".replace(
                " 0.", " ."
            ),
            f"({short[0][1]} to {short[0][2]} without a remedy, {short[1][1]} to {short[1][2]} with clip 1)",
            f"by {short[2][0]} ({short[2][1]} to {short[2][2]}) in the mean of all",
            f"first losses differ by {apart[:, 0].max():.1e} at most".replace("e-0", "e-"),
            f"their fourth by up to {apart[:, 3].max():.2f} (ten seeds)".replace(" 0.", " ."),
        ],
    )
    assert (worse > 0).sum() == 9


def test_what_examine_cannot_foresee(facts: Facts) -> None:
    runs = [facts.of("rnn", f"temporal order {length}", "none") for length in (30, 50)]
    lost = [int((~own["kept"]).sum()) for own in runs]
    near = sum(int(((own["final_loss"] - own["start_loss"]).abs() < 0.05).sum()) for own in runs)
    count = sum(map(len, runs))
    says(
        "docs/examine.md",
        [
            f"of the ten recorded runs of each length {lost[0]} and {lost[1]}.",
            f"In {near} of these {count} the two losses differ by less than .05.",
            f"is right for {sum(lost)} of the {count};",
        ],
    )


def test_what_the_cap_of_a_learnt_limit_does() -> None:
    (path,) = (ROOT / "benchmarks" / "results" / "study" / "caps").glob("*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    runs = pd.DataFrame(run for experiment in document["experiments"] for run in experiment["runs"])
    setting = ["problem", "learning_rate"]
    survived = runs[runs["arm"] == "none"].groupby(setting)["survived"].mean()
    hard = runs.join(survived.rename("without"), on=setting).query("without <= 0.5")
    found = hard.groupby("arm")[["survived", "learned"]].agg(["size", "sum"])
    names = {
        "none": "no remedy",
        "clip 1": "clip 1",
        "ClipZScore capped": "ClipZScore, capped at 1 as published",
        "ClipZScore": "ClipZScore (no cap: our default)",
        "ClipRelative": "ClipRelative (capped in its warm-up, as published)",
        "ClipRelative uncapped": "ClipRelative without a cap",
    }
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for arm, name in names.items():
        (count, kept), (_, learned) = found.loc[arm, "survived"], found.loc[arm, "learned"]
        assert f"| {name} | {count} | {kept} | {learned} |" in text
    losses = hard[hard["arm"].isin(["clip 1", "ClipZScore capped"])]
    equal = losses.groupby([*setting, "seed"])["final_loss"].nunique(dropna=False) == 1
    assert f"{equal.sum()} of {len(equal)} runs end at the same loss" in text


def test_what_keeps_a_transformer() -> None:
    records = (ROOT / "benchmarks" / "results" / "study" / "transformer").glob("*.json")
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(records)]
    assert [document["status"] for document in documents] == ["complete"] * 2
    runs = pd.concat(
        table.runs_of(e).astype({"arm": object}) for d in documents for e in d["experiments"]
    )
    assert set(runs["arm"]) == {arm.name for arm in TRANSFORMER_SGD.arms}
    names = {
        "none": "no remedy",
        "warmup": "warm-up",
        "pre-LN": "norms before the layers",
        "init / 2": "half of Glorot's start",
    }
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    settings = runs.groupby(["problem", "learning_rate"], sort=False, observed=True)
    for arm in runs["arm"].unique():
        cells = []
        for _, setting in settings:
            own = setting[setting["arm"] == arm]
            assert own["survived"].nunique() == own["learned"].nunique() == 1
            bits = f"{own['metric'].mean():.1f}" if own["survived"].all() else "diverges"
            cells.append(f"**{bits}**" if own["learned"].all() else bits)
        assert f"| {names.get(arm, arm)} | {' | '.join(cells)} |" in text
    assert f"({len(runs)} runs," in text
    (problem,) = documents[0]["experiments"][0]["problems"]
    assert f"frequencies of the characters give {problem['metric']['guessing']:.1f}" in text
