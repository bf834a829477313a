"""What the integrations share, and that none of the libraries is imported unless it is used."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import steadygrad as sg
from steadygrad.integrations.readings import (
    clips,
    name_parameters,
    readings,
    stabilized,
    warn_of_second_clipper,
)
from tests.digit_training import OPTIMIZERS, batches, loss_of, network

pytestmark = pytest.mark.usefixtures("one_thread")
LIBRARIES = ["lightning", "pytorch_lightning", "transformers", "accelerate", "timm"]
LIBRARIES += ["tensorboard", "torchvision", "matplotlib", "huggingface_hub", "mlxtend", "sklearn"]


class Around:
    """Holds an optimizer, as accelerate's wrapper does."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def stepped(optimizer: Any, model: Any) -> Any:
    for batch in batches(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("module", ["steadygrad", "steadygrad.integrations"])
def test_nothing_is_imported_unless_it_is_used(module: str) -> None:
    code = f"import {module}, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    imported = json.loads(done.stdout)
    assert module in imported
    assert not {name.partition(".")[0] for name in imported} & set(LIBRARIES)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_behind_wrappers(kind: str) -> None:
    optimizer = OPTIMIZERS[kind](network().parameters())
    for wrapped in (optimizer, Around(optimizer), Around(Around(optimizer))):
        assert stabilized(wrapped) is optimizer
    plain = torch.optim.SGD(network().parameters(), lr=0.1)
    assert stabilized(plain) is None and stabilized(Around(plain)) is None
    assert stabilized(None) is None


@pytest.mark.parametrize("telemetry", [None, "global", "tensor"])
def test_readings(telemetry: Any) -> None:
    model = network()
    optimizer = sg.optim.SGD(model.parameters(), lr=0.1, max_norm=0.01, telemetry=telemetry)
    assert readings(optimizer) == {}
    found = readings(stepped(optimizer, model))
    assert found["grad_norm"] == float(optimizer.grad_norm) > 0.01
    assert found["clipped_steps"] == 2 and found["skipped_steps"] == 0
    if telemetry is None:
        assert set(found) == {"grad_norm", "clipped_steps", "skipped_steps"}
    else:
        assert found["limit"] == 0.01
        assert found["clipped_norm"] == pytest.approx(0.01, rel=1e-3)


def test_limits_that_are_no_numbers_are_left_out() -> None:
    model = network()
    unlimited = sg.optim.SGD(model.parameters(), lr=0.1, telemetry="global")
    assert "limit" not in readings(stepped(unlimited, model))
    each = sg.optim.SGD(model.parameters(), max_norm=1.0, clip_scope="tensor", telemetry="global")
    assert "limit" not in readings(stepped(each, model))


def test_names_that_do_not_match_are_no_reason_to_stop() -> None:
    model, other = network(), network()
    optimizer = sg.optim.SGD(model.parameters(), lr=0.1, telemetry="tensor")
    with pytest.warns(
        UserWarning, match="expected a name for each of the optimizer's 4 parameters"
    ):
        name_parameters(optimizer, other.named_parameters())
    assert "param_names" not in optimizer.param_groups[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        name_parameters(optimizer, model.named_parameters())
        # Names that the user has given stay.
        name_parameters(optimizer, ((f"model.{name}", p) for name, p in model.named_parameters()))
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, False),
        ({"max_norm": 1.0}, True),
        ({"clip_value": 1.0}, True),
        ({"clip": sg.ClipPercentile()}, True),
        ({"skip": sg.SkipSpikes()}, False),
    ],
)
def test_what_a_second_clipper_is_told_by(options: dict[str, Any], own: bool) -> None:
    inner = torch.optim.SGD(network().parameters(), lr=0.1)
    optimizer = sg.Stabilizer(inner, **options)
    assert clips(optimizer) == own
    with pytest.warns(UserWarning) as found:
        warn_of_second_clipper(optimizer, "Trainer(limit=2.0)", "leave limit out", 2.0)
    message = str(found[0].message)
    assert "Trainer(limit=2.0) clips the gradients before Stabilizer(SGD)" in message
    assert ("two clippers" in message and "Keep the optimizer's own" in message) == own
    assert ("Give the optimizer max_norm=2.0" in message) == (not own)
    assert "leave limit out" in message


def test_a_limit_of_one_group_is_one() -> None:
    model = network()
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = sg.optim.SGD(groups, lr=0.1)
    assert not clips(optimizer)
    optimizer.param_groups[2]["max_norm"] = 1.0
    assert clips(optimizer)
