"""Writers get every step once, and none of them ends a training."""

from __future__ import annotations

import copy
import csv
import gc
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steadygrad as sg
from steadygrad.telemetry import CSVWriter, JSONLWriter, TensorBoardWriter
from tests.backends import Backend


def model_of(backend: Backend | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    return model if backend is None else model.to(backend.device)


def stepped(model: nn.Module, telemetry: sg.Telemetry, steps: int, nan_at: int = -1) -> Any:
    opt = sg.Stabilizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1), max_norm=0.5, telemetry=telemetry
    )
    go_on(model, opt, steps, nan_at)
    return opt


def go_on(model: nn.Module, opt: Any, steps: int, nan_at: int = -1) -> None:
    for step in range(steps):
        for param in model.parameters():
            param.grad = torch.full_like(param, math.nan if step == nan_at else 0.1 + 0.01 * step)
        opt.step()


@pytest.mark.parametrize("level", ["global", "tensor"])
def test_every_step_is_written_once(backend: Backend, level: Any, tmp_path: Path) -> None:
    records: list[sg.StepRecord] = []
    writers = [records.append, JSONLWriter(tmp_path / "a.jsonl"), CSVWriter(tmp_path / "a.csv")]
    telemetry = sg.Telemetry(level=level, history=8, every=3, writers=writers)
    opt = stepped(model_of(backend), telemetry, 20, nan_at=4)
    opt.flush_telemetry()
    opt.flush_telemetry()
    assert [record.step for record in records] == list(range(20))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    with (tmp_path / "a.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(lines) == len(table) == 20
    for record, line, row in zip(records, lines, table, strict=True):
        for name, value in record.totals().items():
            for read in (float(line[name]), float(row[name])):
                assert read == value or (math.isnan(read) and math.isnan(value))
    assert [row["skipped"] for row in table] == ["1" if step == 4 else "0" for step in range(20)]
    if level == "global":
        assert "tensor_norms" not in lines[0] and "norm:0.weight" not in table[0]
        return
    assert lines[0]["tensor_norms"].keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert lines[4]["tensor_nonfinite"] == {"0.weight": 12, "0.bias": 4, "1.weight": 4, "1.bias": 1}
    assert lines[5]["tensor_nonfinite"] == {}
    assert float(table[3]["norm:1.bias"]) == lines[3]["tensor_norms"]["1.bias"]
    assert float(table[4]["nonfinite:0.weight"]) == 12


def test_an_existing_file_is_gone_on_with(tmp_path: Path) -> None:
    model = model_of()
    for _ in range(2):
        telemetry = sg.Telemetry(level="global", writers=[CSVWriter(tmp_path / "a.csv")])
        stepped(model, telemetry, 3).flush_telemetry()
    with (tmp_path / "a.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"] * 2
    other = sg.Telemetry(level="tensor", writers=[CSVWriter(tmp_path / "a.csv")])
    with pytest.warns(RuntimeWarning, match="expected a new file or one with 17 columns"):
        stepped(model, other, 3).flush_telemetry()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk needs /dev/full")
@pytest.mark.parametrize("make", [JSONLWriter, CSVWriter])
def test_a_full_disk_is_a_warning(make: Any) -> None:
    records: list[sg.StepRecord] = []
    model = model_of()
    telemetry = sg.Telemetry(every=2, writers=[make("/dev/full"), records.append])
    opt = stepped(model, telemetry, 1)
    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        go_on(model, opt, 9)
    assert len(caught) == 1  # it is not called again
    assert "training goes on" in str(caught[0].message)
    opt.flush_telemetry()
    assert [record.step for record in records] == list(range(10))
    assert opt.report().steps == 10


def test_a_callback_that_raises_is_a_warning() -> None:
    def broken(record: sg.StepRecord) -> None:
        raise KeyError("no such run")

    with pytest.warns(RuntimeWarning, match="KeyError: 'no such run'"):
        opt = stepped(model_of(), sg.Telemetry(every=1, writers=[broken]), 4)
    assert opt.report().steps == 4


@pytest.mark.full
def test_what_is_left_is_written_at_the_end(tmp_path: Path) -> None:
    opt = stepped(model_of(), sg.Telemetry(writers=[JSONLWriter(tmp_path / "a.jsonl")]), 7)
    del opt
    gc.collect()
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 7
    script = f"""
import torch, steadygrad as sg
param = torch.nn.Parameter(torch.zeros(2))
telemetry = sg.Telemetry(writers=[sg.telemetry.JSONLWriter({str(tmp_path / "b.jsonl")!r})])
opt = sg.optim.SGD([param], lr=0.1, telemetry=telemetry)
for _ in range(7):
    param.grad = torch.ones(2)
    opt.step()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 7


def test_copies_have_no_writers(tmp_path: Path) -> None:
    model = model_of()
    path = tmp_path / "a.jsonl"
    opt = stepped(model, sg.Telemetry(level="tensor", writers=[JSONLWriter(path)]), 2)
    opt.flush_telemetry()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        param = other.param_groups[0]["params"][0]
        param.grad = torch.ones_like(param)
        other.step()
        other.flush_telemetry()
        assert other.report().history.step.tolist() == [2]
        assert other.report().history.tensor_norms.shape == (1, 4)
    assert len(path.read_text().splitlines()) == 2


def test_tensorboard(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    telemetry = sg.Telemetry(level="tensor", writers=[TensorBoardWriter(tmp_path)])
    opt = stepped(model_of(), telemetry, 5, nan_at=2)
    opt.flush_telemetry()
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("steadygrad/norm")}
    history = opt.telemetry
    assert found.keys() == {0, 1, 3, 4}
    assert all(math.isclose(found[s], history.norm[s], rel_tol=1e-6) for s in found)
    assert len(events.Scalars("steadygrad_tensors/0.weight")) == 4
    assert [event.value for event in events.Scalars("steadygrad/skipped")] == [0, 0, 1, 0, 0]


def test_tensorboard_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'steadygrad\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": "layer"}, ValueError, "level: expected 'global' or 'tensor', got 'layer'"),
        ({"history": 0}, ValueError, "history: expected an int >= 1, got 0"),
        ({"history": 2.5}, TypeError, "history: expected an int >= 1, got 2.5"),
        ({"history": 5, "every": 6}, ValueError, "every: expected at most history, 5, got 6"),
        ({"every": 0}, ValueError, "every: expected an int >= 1, got 0"),
        ({"stop_after_skips": 0}, ValueError, "stop_after_skips: expected an int >= 1, got 0"),
        ({"writers": ["a.csv"]}, TypeError, "writers: expected callables that take a StepRecord"),
    ],
)
def test_bad_settings_are_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"Telemetry: {message}"):
        sg.Telemetry(**options)


@pytest.mark.parametrize(
    ("value", "error"), [(True, TypeError), (3, TypeError), ("on", ValueError)]
)
def test_another_option_is_refused(value: Any, error: Any) -> None:
    with pytest.raises(error, match="expected"):
        sg.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, telemetry=value)


def test_a_loaded_state_leaves_no_step_unwritten(backend: Backend) -> None:
    model = model_of(backend)
    records: list[sg.StepRecord] = []
    opt = stepped(model, sg.Telemetry(level="tensor", writers=[records.append]), 3)
    saved = opt.state_dict()
    go_on(model, opt, 2)
    opt.load_state_dict(saved)
    go_on(model, opt, 1)
    late = nn.Parameter(torch.ones(2, device=backend.device))
    opt.add_param_group({"params": [late], "param_names": ["late"]})
    opt.flush_telemetry()  # the new parameter has no column yet
    late.grad = torch.ones_like(late)
    go_on(model, opt, 1)
    opt.flush_telemetry()
    assert [record.step for record in records] == [0, 1, 2, 3, 4, 3, 4]
    assert [len(record.names) for record in records] == [4] * 6 + [5]


def test_a_ring_that_comes_round_is_written_whole(backend: Backend) -> None:
    model = model_of(backend)
    records: list[sg.StepRecord] = []
    telemetry = sg.Telemetry(history=7, every=3, writers=[records.append])
    opt = stepped(model, telemetry, 23)
    assert len(opt.telemetry) == 7
    opt.flush_telemetry()
    assert [record.step for record in records] == list(range(23))
    expected = [record.norm for record in records[-7:]]
    assert opt.report().history.norm.tolist() == expected
