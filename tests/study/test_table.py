"""Tests the tables of a study: rows, intervals, hard settings, comparisons on held-out data, twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from study import page, table
from study.table import Mean, mean_of, wilson
from tests.study.records import ACCURACY, BITS, a_problem, a_run, an_arm, an_experiment

NONE, CLIP, L1 = an_arm("none"), an_arm("clip 1", "clipping"), an_arm("L1", "penalty")


def experiment(
    what: dict[Any, Any], arms: list[dict[str, Any]] | None = None, **options: Any
) -> dict[str, Any]:
    """Return an experiment whose arms have an outcome, or (outcome, metric), per learning rate."""

    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float] | None:
        found = what.get((arm, rate), what.get(arm))
        if found is None:
            return None
        kind, metric = found if isinstance(found, tuple) else (found, 0.9)
        return kind, metric + 0.001 * seed

    return an_experiment("e", arms or [NONE, CLIP, L1], outcomes, **options)


def held_out(made: dict[str, Any], arm: str = "clip 1") -> tuple[int, int, int]:
    return table.held_out(made, table.runs_of(made), arm)


def overview(*made: dict[str, Any]) -> dict[str, list[str]]:
    """Return the other cells of each row of the overview, by name of the remedy."""
    rows = page.overview(made, [table.runs_of(each) for each in made]).rows
    return {row[0]: list(row[1:]) for row in rows}


# --- intervals ---


def test_mean_has_student_s_interval() -> None:
    found = mean_of(pd.Series([1.0, 2.0, 3.0, 4.0, 5.0, math.nan, math.inf]))
    # t_.975,4 = 2.776; s = 1.5811
    assert found == pytest.approx((3.0, 3 - 1.9629, 3 + 1.9629, 5), abs=1e-3)
    assert mean_of(pd.Series([7.0])).text() == "7"
    assert mean_of(pd.Series([7.0, 7.0])).text() == "7 (7 to 7)"
    assert (
        mean_of(pd.Series([math.inf])).text() == mean_of(pd.Series([], dtype=float)).text() == "-"
    )
    assert Mean(0.002, 0.001, 0.003, 5).text(1e3) == "2 (1 to 3)"


def test_intervals_of_shares_end_at_0_and_1() -> None:
    values = pd.Series([0.99, 1.0, 0.8, 1.0])
    assert mean_of(values).high > 1.0
    assert mean_of(values, 0.0, 1.0)[1:3] == (mean_of(values).low, 1.0)
    low = [{**a_run("p", "none", 0.1, seed, "idle", float(seed))} for seed in range(2)]
    made = {**experiment({}), "runs": low}
    (row,) = table.summarise(made, table.runs_of(made)).itertuples()
    assert row.metric.low == 0.0 and row.metric.high == 1.0
    in_bits = {**made, "problems": [a_problem("p", BITS)]}
    (row,) = table.summarise(in_bits, table.runs_of(in_bits)).itertuples()
    assert row.metric.low == 0.0 and row.metric.high > 1.0


def test_shares_have_wilson_s_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(5, 5) == pytest.approx((0.5655, 1.0), abs=1e-4)
    assert wilson(0, 5) == pytest.approx((0.0, 0.4345), abs=1e-4)


def test_figures() -> None:
    values = (0.0, 0.9123, 12.34, 1234.5, 2.5e7, 3.1e-7, math.inf, math.nan, -0.002)
    assert [table.figure(v) for v in values] == [
        *("0", "0.912", "12.3", "1,234", "2.5e7", "3.1e-7", "inf", "nan", "-0.002")
    ]


# --- rows ---


def test_rows_count_every_seed() -> None:
    def run(seed: int, kind: str = "learned", rate: float = 0.01, **changes: Any) -> dict[str, Any]:
        return a_run("p", changes.pop("arm", "none"), rate, seed, kind, 0.8) | changes

    runs = [
        run(0, steps=200, clipped_steps=50, metric=0.8, seconds_per_step=0.002),
        run(
            2, steps=200, clipped_steps=150, metric=0.6, seconds_per_step=0.004, steps_to_target=60
        ),
        run(1, "lost"),
        run(0, arm="clip 1", rate=0.1),
        run(0, arm="clip 1", rate=0.001),
    ]
    made = {**experiment({}), "runs": runs}
    rows = table.summarise(made, table.runs_of(made))
    assert list(zip(rows["arm"], rows["learning_rate"], strict=True)) == [
        *(("none", 0.01), ("clip 1", 0.001), ("clip 1", 0.1))
    ]
    first, second, _ = rows.itertuples()
    assert (first.runs, first.survived, first.learned, first.exploded, first.kept) == (
        3,
        2,
        2,
        1,
        2,
    )
    assert (first.exploded_in, first.exploded_step) == ({"2.weight": 1}, 7)
    assert first.metric[::3] == (pytest.approx(0.7), 2)
    assert first.clip_rate == pytest.approx((0.25 + 0.75 + 0) / 3)
    assert first.largest_norm == math.inf
    assert (first.reached, first.steps_to_target) == (2, 40)
    assert first.seconds.mean == pytest.approx(0.003)
    assert not second.seconds.finite  # forty steps are too few for a time
    texts = {name: column(first) for name, column in table.COLUMNS.items()}
    assert texts["steps to target"] == "40 (2 of 3)" and texts["first in"] == "2.weight (1)"
    assert (texts["clipped"], texts["skipped"], texts["MiB"]) == ("33.3 %", "-", "2")


def test_rows_come_in_the_order_of_the_declaration() -> None:
    problems = [a_problem(f"{layers} layers") for layers in (5, 20, 10)]
    made = an_experiment("e", [L1, CLIP], lambda *_: ("learned", 0.9), problems=problems)
    rows = table.summarise(made, table.runs_of(made))
    assert list(rows["arm"].astype(str).unique()) == ["L1", "clip 1"]
    names = [name for name, _ in rows.groupby(table.SETTING, observed=True)]
    assert [name for name, _ in names][::2] == ["5 layers", "20 layers", "10 layers"]


def test_runs_of_what_is_not_declared_are_refused() -> None:
    made = {**experiment({}), "runs": [a_run("p", "prayer", 0.1, 0, "learned", 0.9)]}
    with pytest.raises(ValueError, match=r"e: expected a arm of .*, got \['prayer'\]"):
        table.runs_of(made)


# --- what keeps training from exploding ---


@pytest.mark.parametrize(
    ("run", "kept"),
    [("learned", True), ("idle", True), ("spiked", True), ("flat", False), ("lost", False)],
)
def test_a_run_is_lost_or_kept(run: str, kept: bool) -> None:
    made = experiment({"none": run})
    runs = table.runs_of(made)
    assert set(runs["kept"]) == {kept}
    assert bool(table.hard_settings(made, runs)) is not kept


def test_a_run_that_exploded_and_survived_without_learning_is_lost() -> None:
    made = experiment({"none": "idle"})
    made["runs"] = [{**run, "exploded_step": 3} for run in made["runs"]]
    assert not table.runs_of(made)["kept"].any()


def test_settings_are_hard_where_at_least_half_of_the_baseline_is_lost() -> None:
    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float]:
        return ("lost" if seed < 10 * rate else "learned"), 0.9

    made = an_experiment("e", [NONE], outcomes, rates=(0.1, 0.2, 0.3), seeds=(0, 1, 2, 3))
    assert table.hard_settings(made, table.runs_of(made)) == [("p", 0.2), ("p", 0.3)]


def test_overview_counts_runs_in_hard_settings_alone() -> None:
    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float]:
        if rate == 0.01:  # the setting is not hard, so it does not count
            return "learned", 0.9
        return ("learned" if arm == "clip 1" and seed < 3 else "lost"), 0.9

    found = overview(an_experiment("e", [NONE, CLIP, L1], outcomes))
    assert found["clip 1 (clipping)"][:2] == ["3/5, learned 3", "3/5 (0.23 to 0.88), learned 3"]
    assert found["L1 (penalty)"][:2] == ["0/5, learned 0", "0/5 (0.00 to 0.43), learned 0"]


def test_overview_adds_up_over_experiments() -> None:
    good = experiment({"none": "lost", "clip 1": "learned"})
    bad = experiment({"none": "flat", "clip 1": "lost"}, [NONE, CLIP])
    easy = experiment({"none": "learned", "clip 1": "lost", "L1": ("learned", 0.95)})
    assert overview(good, bad, easy)["clip 1 (clipping)"] == [
        *("10/10, learned 10", "0/10, learned 0", "-"),
        *("10/20 (0.30 to 0.70), learned 10", "better in 0, worse in 2 of 2"),
    ]
    assert overview(easy)["L1 (penalty)"] == ["-", "-", "better in 2, worse in 0 of 2"]
    assert overview(easy)["none"] == ["-", "-", "-"]  # the baseline is not compared with itself


# --- what helps on held-out data ---


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (("learned", 0.95), (2, 0, 2)),
        (("learned", 0.85), (0, 2, 2)),
        ("lost", (0, 2, 2)),  # a run without a finite metric is worse than any that learned
        (None, (0, 0, 0)),
    ],
)
def test_held_out_data(ours: Any, expected: tuple[int, int, int]) -> None:
    assert held_out(experiment({"none": "learned", "clip 1": ours})) == expected


@pytest.mark.parametrize(
    ("above", "expected"), [([0.01, 0.012, 0.011], (2, 0, 2)), ([0.01, -0.012, 0.011], (0, 0, 2))]
)
def test_runs_are_compared_seed_by_seed(above: list[float], expected: tuple[int, ...]) -> None:
    """Check a remedy that adds less to each seed than the seeds of the baseline differ by."""

    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float]:
        return "learned", 0.5 + 0.1 * seed + (above[seed] if arm == "clip 1" else 0.0)

    assert held_out(an_experiment("e", [NONE, CLIP], outcomes, seeds=(0, 1, 2))) == expected


def test_held_out_data_where_less_is_better_and_where_results_are_mixed() -> None:
    what = {"none": ("learned", 2.5), "clip 1": ("learned", 2.2)}
    assert held_out(experiment(what, problems=[a_problem("p", BITS)])) == (2, 0, 2)
    mixed = {("clip 1", 0.01): ("learned", 0.95), ("clip 1", 0.1): ("learned", 0.8)}
    assert held_out(experiment({"none": "learned", **mixed})) == (1, 1, 2)


def test_held_out_data_count_only_where_the_baseline_always_learns() -> None:
    what = {("none", 0.01): "learned", ("none", 0.1): "idle", "clip 1": ("learned", 0.95)}
    assert held_out(experiment(what)) == (1, 0, 1)


def test_one_seed_makes_no_difference_clear() -> None:
    made = experiment({"none": "learned", "clip 1": ("learned", 0.99)}, seeds=(0,))
    assert held_out(made) == (0, 0, 2)


# --- what is the same ---


def outcomes_of(text: str) -> Callable[[str, str, float, int], tuple[str, float]]:
    """Return a function that gives the outcomes of a text such as ``"none: lost, clip 1: learned"``."""
    kinds = dict(pair.split(": ") for pair in text.split(", "))
    return lambda problem, arm, rate, seed: (kinds[arm], 0.9 + 0.001 * seed)


def test_runs_that_are_equal_in_every_number_are_named() -> None:
    made = an_experiment("e", [NONE, CLIP, L1], outcomes_of("none: lost, clip 1: idle, L1: lost"))
    assert table.same_runs(made, table.runs_of(made)) == [["none", "L1"]]
    apart = an_experiment("e", [NONE, CLIP], outcomes_of("none: lost, clip 1: idle"))
    assert table.same_runs(apart, table.runs_of(apart)) == []


def test_twins_are_compared_seed_by_seed() -> None:
    arms = [NONE, CLIP, an_arm("clip 1 (torch)", "clipping", by="torch", twin="clip 1")]
    ours = [a_run("p", "clip 1", 0.01, seed, "learned", 0.9) for seed in (0, 1, 2)]
    theirs = [a_run("p", "clip 1 (torch)", 0.01, s, "learned", 0.9 - 0.1 * s) for s in (0, 1)]
    for run in (*ours, *theirs):
        run |= {"steps": 200, "first_losses": [2.4, "nan", 0.5], "seconds_per_step": 0.001}
    for run in theirs:
        run["seconds_per_step"] = 0.002 + 0.001 * run["seed"]
        run["first_losses"] = [2.4, 1.0, 0.5 * (1 + 1e-6)][: 3 - run["seed"]]
    made = {**an_experiment("e", arms, lambda *_: None), "runs": [*theirs, *ours]}
    (twin,) = table.twins(made, table.runs_of(made))
    half = 12.706 * 0.0707107 / math.sqrt(2)  # t_.975,1
    assert twin == {
        "ours": "clip 1",
        "torch's": "clip 1 (torch)",
        "setting": "learning rate 0.01",
        "first difference": "1.0e-6",
        "ours - torch's": f"0.05 ({0.05 - half:.3g} to {0.05 + half:.3g})",
        "time": f"2.5 ({2.5 - 10 * half:.3g} to {2.5 + 10 * half:.3g})",
    }


def test_settings_are_named_by_what_tells_them_apart() -> None:
    one = experiment({})
    several = {**one, "problems": [a_problem("p"), a_problem("q", ACCURACY)]}
    assert table.setting_name(one, "p", 0.1) == "learning rate 0.1"
    assert table.setting_name(several, "q", 0.1) == "q, 0.1"
    assert table.setting_name({**several, "learning_rates": [0.1]}, "q", 0.1) == "q"
