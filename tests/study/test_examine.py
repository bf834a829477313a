"""Tests what examine predicts for recorded runs, and the transformer of the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import study
from study.__main__ import main
from study.examine import foretell, summary
from study.training import rehearse
from study.transformer import TRANSFORMER_ADAMW, TRANSFORMER_SGD, Transformer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]


def record() -> dict[str, Any]:
    (path,) = (ROOT / "benchmarks" / "results" / "study").glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_what_is_foretold_of_recorded_runs() -> None:
    found = list(foretell(record(), 1, "20 layers"))
    assert {one.key.arm for one in found} == {"none", "clip 1", "He init", "batch norm", "L2"}
    assert all(one.said == one.lost for one in found)
    assert summary(found)[0] == "none, other problems: 1 of 1 right, 0 missed, 0 false alarms"


def test_a_missing_record_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["examine"])
    assert "record" in capsys.readouterr().err


def test_a_transformer_sees_no_later_character() -> None:
    network = Transformer(layers=2).build(11, 11, torch.Generator().manual_seed(0))
    codes = torch.randint(11, (2, 9))
    changed = codes.clone()
    changed[:, 6:] = 0
    before, after = network(codes), network(changed)
    assert before.shape == (2, 9, 11)
    torch.testing.assert_close(before[:, :6], after[:, :6])


@pytest.mark.parametrize("experiment", [TRANSFORMER_SGD, TRANSFORMER_ADAMW], ids=lambda e: e.name)
def test_every_arm_can_be_trained(experiment: study.Experiment) -> None:
    task = experiment.problems[0].task()
    for arm in experiment.arms:
        key = study.experiment.RunKey(experiment.problems[0].name, arm.name, 1e-3, 0)
        rehearse(experiment, key, task, measure=False)
