"""What a report concludes: from the runs, whatever they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from study import claims, outcome
from study.experiment_section import section
from study.page import decoded
from tests.study.records import BITS, a_problem, an_arm, an_experiment

NONE, CLIP, L1 = an_arm("none"), an_arm("clip 1", "clipping"), an_arm("L1", "penalty")


def experiment(
    what: dict[str, Any], arms: list[dict[str, Any]] | None = None, **options: Any
) -> dict[str, Any]:
    """One whose arms do the same at each learning rate: name -> outcome, or (outcome, metric)."""

    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float] | None:
        found = what.get((arm, rate), what.get(arm))
        if found is None:
            return None
        kind, metric = found if isinstance(found, tuple) else (found, 0.9)
        return kind, metric + 0.001 * seed

    return an_experiment("e", arms or [NONE, CLIP, L1], outcomes, **options)


@pytest.mark.parametrize(
    ("run", "lost"),
    [("learned", False), ("idle", False), ("spiked", False), ("flat", True), ("lost", True)],
)
def test_a_run_is_lost_or_kept(run: str, lost: bool) -> None:
    made = experiment({"none": run})
    assert {outcome.lost(run) for run in made["runs"]} == {lost}
    assert bool(outcome.hard_settings(made)) is lost


def test_a_run_that_exploded_and_survived_without_learning_is_lost() -> None:
    run = experiment({"none": "idle"})["runs"][0]
    assert outcome.lost({**run, "exploded_step": 3})


def test_settings_are_hard_where_at_least_half_of_the_baseline_is_lost() -> None:
    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float]:
        return ("lost" if seed < 10 * rate else "learned"), 0.9

    made = an_experiment("e", [NONE], outcomes, rates=(0.1, 0.2, 0.3), seeds=(0, 1, 2, 3))
    assert outcome.hard_settings(made) == [("p", 0.2), ("p", 0.3)]


@pytest.mark.parametrize(
    ("kept", "verdict"), [(5, claims.HELD), (3, claims.IN_PART), (2, claims.NOT), (0, claims.NOT)]
)
def test_verdict_follows_the_runs_in_hard_settings(kept: int, verdict: str) -> None:
    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float]:
        if rate == 0.01:  # not hard: says nothing
            return "learned", 0.9
        return ("learned" if arm == "clip 1" and seed < kept else "lost"), 0.9

    made = an_experiment("e", [NONE, CLIP, L1], outcomes)
    found = claims.prevention([made], "clip 1", "clipping")
    assert found == (verdict, f"{kept} of 5 runs kept, {kept} learned")
    assert claims.prevention([made], "L1", "penalty")[0] == claims.NOT


def test_a_claim_that_was_not_put_to_the_test() -> None:
    easy = experiment({"none": "learned", "clip 1": "lost"})
    assert claims.prevention([easy], "clip 1", "clipping") == (claims.UNTESTED, "")
    assert claims.prevention([easy], "L1", "penalty") == (claims.UNTESTED, "")
    assert claims.advice([easy])[0] == (
        "",
        "No setting was hard: in each, more than half of the runs are kept without a remedy.",
    )


def test_verdicts_add_up_over_experiments() -> None:
    good = experiment({"none": "lost", "clip 1": "learned"})
    bad = experiment({"none": "flat", "clip 1": "lost"})
    found = claims.prevention([good, bad], "clip 1", "clipping")
    assert found == (claims.IN_PART, "10 of 20 runs kept, 10 learned")


def test_what_is_left_out_is_read_the_other_way_round() -> None:
    raw = an_arm("raw pixels", "raw data")
    arms = [NONE, raw]
    for run, verdict in (("lost", claims.HELD), ("learned", claims.NOT)):
        made = experiment({"none": "learned", "raw pixels": run}, arms)
        lost = 10 if run == "lost" else 0
        numbers = f"without it {lost} of 10 runs lost where the baseline's are kept"
        assert claims.prevention([made], "raw pixels", "raw data") == (verdict, numbers)
    made = experiment({"none": "learned", "raw pixels": ("learned", 0.8)}, arms)
    helped = claims.generalisation([made], "raw pixels", "raw data")
    assert helped == (claims.HELD, "without it: of 2 settings better in 0, worse in 2")
    hard = experiment({"none": "lost", "raw pixels": "lost"}, arms)
    assert claims.prevention([hard], "raw pixels", "raw data")[0] == claims.UNTESTED
    assert "raw pixels" not in str(claims.advice([hard]))


@pytest.mark.parametrize(
    ("ours", "verdict", "numbers"),
    [
        (("learned", 0.95), claims.HELD, "of 2 settings better in 2, worse in 0"),
        (("learned", 0.85), claims.NOT, "of 2 settings better in 0, worse in 2"),
        ("lost", claims.NOT, "of 2 settings better in 0, worse in 2"),
        (None, claims.UNTESTED, ""),
    ],
)
def test_generalisation(ours: Any, verdict: str, numbers: str) -> None:
    made = experiment({"none": "learned", "clip 1": ours})
    found = claims.generalisation([made], "clip 1", "clipping")
    assert found[0] == verdict and found[1] == numbers


@pytest.mark.parametrize(
    ("above", "verdict"),
    [([0.01, 0.012, 0.011], claims.HELD), ([0.01, -0.012, 0.011], claims.UNCLEAR)],
)
def test_runs_are_compared_seed_by_seed(above: list[float], verdict: str) -> None:
    """The baseline's seeds differ by more than the remedy adds to each of them."""

    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float]:
        return "learned", 0.5 + 0.1 * seed + (above[seed] if arm == "clip 1" else 0.0)

    made = an_experiment("e", [NONE, CLIP], outcomes, seeds=(0, 1, 2))
    assert outcome.differences(made, "clip 1", ("p", 0.1)) == pytest.approx(above)
    assert claims.generalisation([made], "clip 1", "clipping")[0] == verdict


def test_better_here_and_worse_there_is_neither() -> None:
    what = {("clip 1", 0.01): ("learned", 0.95), ("clip 1", 0.1): ("learned", 0.8)}
    made = experiment({"none": "learned", **what})
    found = claims.generalisation([made], "clip 1", "clipping")
    assert found == (claims.MIXED, "of 2 settings better in 1, worse in 1")


def test_runs_that_are_equal_in_every_number_are_named() -> None:
    made = an_experiment("e", [NONE, CLIP, L1], outcomes_of("none: lost, clip 1: idle, L1: lost"))
    assert outcome.equal_runs(made) == [["none", "L1"]]
    (read,) = decoded({"experiments": [made]})["experiments"]
    assert "before it could: none and L1." in " ".join(section(read).markdown().split())
    apart = an_experiment("e", [NONE, CLIP], outcomes_of("none: lost, clip 1: idle"))
    assert outcome.equal_runs(apart) == []


def test_generalisation_where_less_is_better() -> None:
    made = experiment(
        {"none": ("learned", 2.5), "clip 1": ("learned", 2.2)}, problems=[a_problem("p", BITS)]
    )
    assert claims.generalisation([made], "clip 1", "clipping")[0] == claims.HELD


def test_generalisation_counts_only_where_the_baseline_always_learns() -> None:
    made = experiment(
        {("none", 0.01): "learned", ("none", 0.1): "idle", "clip 1": ("learned", 0.95)}
    )
    assert claims.generalisation([made], "clip 1", "clipping")[1].startswith("of 1 setting better")


def test_one_seed_makes_no_difference_clear() -> None:
    made = experiment({"none": "learned", "clip 1": ("learned", 0.99)}, seeds=(0,))
    assert claims.generalisation([made], "clip 1", "clipping")[0] == claims.UNCLEAR


def outcomes_of(text: str) -> Callable[[str, str, float, int], tuple[str, float]]:
    """``"none: lost, clip 1: learned"`` as outcomes."""
    kinds = dict(pair.split(": ") for pair in text.split(", "))
    return lambda problem, arm, rate, seed: (kinds[arm], 0.9 + 0.001 * seed)


def test_advice_names_what_learned_everywhere_and_what_it_costs() -> None:
    made = an_experiment(
        "e", [NONE, CLIP, L1], outcomes_of("none: lost, clip 1: learned, L1: flat")
    )
    assert claims.advice([made]) == [
        ("In all 2 hard settings every run learned with", "clip 1 (2.00 x the time of a step)."),
        ("More than half were lost, and not one learned, with", "L1."),
    ]


def test_advice_turns_around_with_the_runs() -> None:
    made = an_experiment(
        "e", [NONE, CLIP, L1], outcomes_of("none: lost, clip 1: lost, L1: learned"), rates=(0.1,)
    )
    assert claims.advice([made]) == [
        ("In the one hard setting every run learned with", "L1 (2.00 x the time of a step)."),
        ("More than half were lost, and not one learned, with", "clip 1."),
    ]


def test_advice_where_nothing_learns_everywhere() -> None:
    made = an_experiment("e", [NONE, CLIP, L1], outcomes_of("none: lost, clip 1: idle, L1: lost"))
    (lead, first), (_, kept), _ = claims.advice([made])
    assert lead == (
        "With no single remedy did every run learn in all 2 hard settings; of those tried in all, the nearest is"
    )
    assert first == "clip 1 (0 of 10 learned)."
    assert kept == "clip 1 (0 of 10 learned)."


def test_the_nearest_remedy_was_tried_in_all_settings() -> None:
    one = an_experiment("e", [NONE, CLIP, L1], outcomes_of("none: lost, clip 1: idle, L1: learned"))
    two = an_experiment("f", [NONE, CLIP], outcomes_of("none: lost, clip 1: lost"))
    first, second, third = claims.advice([one, two])
    assert first[0].startswith("With no single remedy did every run learn in all 4 hard settings")
    assert first[1] == "clip 1 (0 of 20 learned)."
    assert second[1] == "L1 (10 of 10 learned)."
    assert third == ("Runs were lost, half of them at most, with", "clip 1 (0 of 20 learned).")


def test_what_loses_most_runs_is_told_apart_by_whether_any_learned() -> None:
    def outcomes(_: str, arm: str, rate: float, seed: int) -> tuple[str, float]:
        return ("learned" if arm == "clip 1" and seed < 2 else "lost"), 0.9

    made = an_experiment("e", [NONE, CLIP, L1], outcomes)
    assert claims.advice([made])[1:] == [
        ("More than half of the runs were lost with", "clip 1 (4 of 10 learned)."),
        ("More than half were lost, and not one learned, with", "L1."),
    ]


def test_a_network_that_stands_still_has_not_exploded() -> None:
    made = experiment({"none": "lost", "clip 1": "flat"})
    still = {**made, "runs": [{**run, "exploded_step": None} for run in made["runs"]]}
    assert claims.prevention([made], "clip 1", "clipping")[0] == claims.NOT
    assert claims.prevention([still], "clip 1", "clipping")[0] == claims.STILL


def test_advice_on_remedies_that_were_tried_less_often() -> None:
    both = an_experiment("e", [NONE, CLIP, L1], outcomes_of("none: lost, clip 1: idle, L1: spiked"))
    one = an_experiment("f", [NONE, CLIP], outcomes_of("none: lost, clip 1: idle"))
    assert claims.advice([both, one])[1:] == [
        (
            "In the fewer hard settings in which they were tried, every run learned with",
            "L1 (10 of 10 learned).",
        ),
        ("No run was lost, but not every one learned, with", "clip 1 (0 of 20 learned)."),
    ]


def test_advice_on_held_out_data() -> None:
    mixed = an_arm("mixed", "data")
    what: dict[Any, Any] = {"none": "learned", "clip 1": ("learned", 0.95), "L1": ("learned", 0.8)}
    made = experiment(what)
    better, worse = claims.advice([made])[-2:]
    assert better[1] == "clip 1 (in 2 of 2 settings)."
    assert worse[1] == "L1 (in 2 of 2 settings)."
    what |= {("mixed", 0.01): ("learned", 0.95), ("mixed", 0.1): ("learned", 0.8)}
    made = experiment(what, [NONE, mixed, CLIP])
    assert [text for _, text in claims.advice([made])[-3:]] == [
        "clip 1 (in 2 of 2 settings).",
        "no remedy.",
        "mixed (better in 1, worse in 1 of 2 settings).",
    ]


def test_section_says_each_claim_once_with_its_arms() -> None:
    quarter = an_arm("clip .25", "clipping")
    made = an_experiment(
        "e",
        [NONE, CLIP, quarter, L1, an_arm("mine", "my remedy")],
        outcomes_of("none: lost, clip 1: learned, clip .25: idle, L1: lost, mine: learned"),
    )
    text = claims.section([made]).markdown()
    assert (
        "- **Clipping gradients keeps them from exploding:** held for clip 1 (10 of 10 runs kept, "
        "10 learned) and clip .25 (10 of 10 runs kept, 0 learned)." in text
    )
    assert (
        "penalties on the parameters keep gradients from exploding:** did not hold for L1" in text
    )
    assert "- **my remedy keeps gradients from exploding:** held for mine" in text
    assert "Hard settings: e (2 of 2 settings)." in text
    assert "| L1 (penalty) | did not hold (0 of 10 runs kept, 0 learned) | not put to" in text


def test_words_in_a_list() -> None:
    assert [claims.listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        *("a", "a and b", "a, b and c")
    ]
