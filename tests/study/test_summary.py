"""Rows, intervals, twins, sentences and the record of the study."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

import study
from study import Classification, record
from study import remedies as r
from study.conclusions import conclusions, findings
from study.encoding import decode_run, encode
from study.intervals import mean, rate
from study.report import table
from study.summary import twins
from tests.study.runs import EXPLODED, a_run, blobs, tiny
from tests.study.runs import one_thread as one_thread

METRIC = Classification(blobs()).metric


def test_mean_has_student_s_interval() -> None:
    found = mean([1.0, 2.0, 3.0, 4.0, 5.0, math.nan, None])
    assert found is not None
    assert found.mean == 3.0
    # t_.975,4 = 2.776; s = 1.5811
    assert (found.low, found.high) == pytest.approx((3 - 1.9629, 3 + 1.9629), abs=1e-3)
    assert found.values == (1.0, 2.0, 3.0, 4.0, 5.0)
    single = mean([7.0])
    assert single is not None and (single.low, single.high) == (None, None)
    assert mean([math.inf]) is None
    many = mean([float(i % 2) for i in range(100)])
    assert many is not None and many.high is not None
    assert many.high == pytest.approx(0.5 + 1.98422 * 0.502519 / 10, abs=1e-4)


def test_rate_has_wilson_s_interval() -> None:
    found = rate([True] * 8 + [False] * 2)
    assert (found.count, found.of, found.share) == (8, 10, 0.8)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert rate([True] * 5).low == pytest.approx(0.5655, abs=1e-4)
    assert rate([False] * 5).high == pytest.approx(0.4345, abs=1e-4)
    with pytest.raises(ValueError, match="rate: outcomes"):
        rate([])


def test_rows_count_every_seed() -> None:
    runs = [
        a_run(steps=200, clipped_steps=50, metric=0.8, seconds_per_step=0.002),
        a_run(seed=2, steps=200, clipped_steps=150, metric=0.6, seconds_per_step=0.004),
        EXPLODED,
        a_run(arm="clip", learning_rate=0.1),
        a_run(arm="clip", learning_rate=0.001),
    ]
    rows = study.summarise(runs)
    assert [(row.arm, row.learning_rate) for row in rows] == [
        ("none", 0.01),
        ("clip", 0.001),
        ("clip", 0.1),
    ]
    first = rows[0]
    assert (first.runs, first.survived.count, first.learned.count) == (3, 2, 2)
    assert (first.exploded.count, first.exploded_parameters) == (1, {"0.weight": 1})
    assert first.metric is not None and first.metric.values == (0.8, 0.6)
    assert (first.nonfinite_steps, first.exploded_steps) == ((3,), (2,))
    assert first.clip_rate is not None
    assert first.clip_rate.mean == pytest.approx((0.25 + 0.75 + 0) / 3)
    assert (first.max_grad_norm.median, first.max_grad_norm.largest) == (5.0, math.inf)
    assert (first.steps_to_target.reached, first.steps_to_target.median) == (2, 2)
    assert first.seconds_per_step is not None
    assert first.seconds_per_step.mean == pytest.approx(0.003)
    assert rows[1].seconds_per_step is None  # three steps tell nothing


def test_twins_are_compared_seed_by_seed() -> None:
    experiment = tiny()
    ours = [
        a_run(arm="clip 1", learning_rate=1e-3, seed=s, steps=200, metric=0.9) for s in (0, 1, 2)
    ]
    theirs = [
        a_run(
            arm="clip 1 (torch)",
            learning_rate=1e-3,
            seed=seed,
            steps=200,
            metric=0.9 - 0.1 * seed,
            seconds_per_step=0.002 + 0.001 * seed,
            first_losses=(2.4, 1.0, 0.5 * (1 + 1e-6)),
        )
        for seed in (0, 1)
    ]
    (twin,) = twins(experiment, [*ours, *theirs])
    assert (twin.ours, twin.torch) == ("clip 1", "clip 1 (torch)")
    assert twin.first_difference == pytest.approx(1e-6, rel=1e-3)
    assert twin.metric_difference is not None and twin.time_ratio is not None
    assert twin.metric_difference.values == pytest.approx((0.0, 0.1))
    assert twin.time_ratio.values == pytest.approx((2.0, 3.0))


def test_conclusions_come_from_the_numbers() -> None:
    rows = study.summarise(
        [
            EXPLODED,
            a_run(learning_rate=0.1, final_loss=60.0, metric=0.1, survived=False, learned=False),
            a_run(arm="clip", metric=0.9),
            a_run(arm="clip", learning_rate=0.1, metric=0.1, learned=False),
        ]
    )
    none, clip = (sentence for _, sentence in conclusions(rows, METRIC))
    assert none == (
        "0 of 2 runs survived and 0 learned; "
        "at learning rate 0.01 the loss of 1 of 1 runs blew up (at step 3); "
        "at learning rate 0.1 it stayed finite but ended no lower than it began; "
        "at no learning rate did every seed learn."
    )
    assert clip == (
        "2 of 2 runs survived and 1 learned (none: 0 of 2 survived); "
        "at learning rate 0.1 it survived without learning; "
        "it learned best at 0.01, with a test accuracy of .90."
    )
    assert conclusions([], METRIC) == []


def test_policies_are_set_beside_the_best_fixed_limit() -> None:
    arms = (r.NONE, r.CLIP, r.CLIP_TENTH, r.PERCENTILE, r.Z_SCORE, r.RELATIVE)
    metrics: dict[str, tuple[float | None, float | None]] = {
        "none": (0.9, 0.9),  # no limit
        "clip 1": (0.5, 0.7),
        "clip .1": (0.9, None),  # cannot be the best: a run was lost
        "ClipPercentile": (None, None),
        "ClipZScore": (0.66, 0.66),
        "ClipRelative": (0.3, None),
    }
    runs = [
        a_run(arm=arm, seed=seed, learning_rate=0.5, metric=metric)
        for arm, pair in metrics.items()
        for seed, metric in enumerate(pair)
    ]
    experiment = tiny(arms=arms)
    (found,) = findings(experiment, study.summarise(runs), {"blobs": METRIC})
    assert found == (
        "blobs, learning rate 0.5: the best fixed limit is that of clip 1, with .60 test accuracy. "
        "Beside it: ClipPercentile without a finite result, ClipZScore 10.0% better, "
        "ClipRelative 50.0% worse in the 1 of 2 runs that ended finite."
    )
    assert findings(tiny(arms=(r.NONE, r.CLIP)), study.summarise(runs), {"blobs": METRIC}) == []


@pytest.mark.parametrize(
    ("value", "bound", "reached"),
    [(0.3, 3 * 0.1, True), (0.29, 0.3, False), (None, 0.3, False), (math.nan, 0.3, False)],
)
def test_a_bound_is_reached(value: float | None, bound: float, reached: bool) -> None:
    assert METRIC.reached(value, bound) == reached


def test_runs_survive_json() -> None:
    for run in (a_run(), EXPLODED, a_run(curve=None)):
        text = json.dumps(encode(run), allow_nan=False)
        assert repr(decode_run(json.loads(text))) == repr(run)  # NaN differs from itself


def test_the_record_says_everything(tmp_path: Path) -> None:
    experiment = tiny()
    task = Classification(blobs())
    runs = [study.train(experiment, key, task) for key in experiment.plan()]
    described = record.describe(experiment, {"blobs": task}, runs[::-1])
    document = record.document(
        record.Study("complete", "default", "now", 1.5, 1, 2, 1, (described,))
    )
    path = tmp_path / "study.json"
    record.write(document, path)
    assert [file.name for file in tmp_path.iterdir()] == ["study.json"]
    stored = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert stored == json.loads(json.dumps(document))
    assert (stored["schema"], stored["machine"]["jobs"]) == (2, 2)
    one = stored["experiments"][0]
    assert [run["seed"] for run in one["runs"]] == [key.seed for key in experiment.plan()]
    assert [arm["name"] for arm in one["arms"]] == [arm.name for arm in experiment.arms]
    assert len(one["rows"]) == 10
    assert [row["arm"] for row in one["rows"]][::2] == [arm.name for arm in experiment.arms]
    assert one["problems"][0]["metric"]["name"] == "test accuracy"
    assert one["problems"][0]["parameters"] == 16 * 12 + 12 + 4 * (12 * 12 + 12) + 12 * 4 + 4
    assert {twin["torch"] for twin in one["twins"]} == {"clip 1 (torch)"}
    assert one["twins"][0]["first_difference"] < 1e-4
    assert {entry["arm"] for entry in one["conclusions"]} == {a.name for a in experiment.arms}
    rows = [{**row, "arm": "SkipSpikes + LRBackoff"} for row in one["rows"]]
    for metric in ("test accuracy", "bits per character"):
        console = Console(file=io.StringIO(), width=80)
        console.print(table("tiny", rows, metric))
        assert isinstance(console.file, io.StringIO)
        assert "\N{HORIZONTAL ELLIPSIS}" not in console.file.getvalue()
