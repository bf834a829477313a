"""Every line and snippet of docs/remedies.md and docs/integrations.md, executed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import swa_utils

import steadygrad as sg
from tests.digit_training import BATCH, batches, dataset, loss_of, network
from tests.integrations.documented_snippets import DOCS, snippets
from tests.integrations.text_training import Text, language_model
from tests.nn.vision_libraries import vision

pytestmark = [
    pytest.mark.usefixtures("one_thread", "folder"),
    # Lightning itself gives this warning under torch 2.13, and on few cores.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
TABLE_LINE = re.compile(r"^\| ([^|]+) \| `(.+)` \| ([^|]+) \|$", re.MULTILINE)
REMEDIES = {
    remedy: line for remedy, line, _ in TABLE_LINE.findall((DOCS / "remedies.md").read_text())
}
INTEGRATIONS = snippets("integrations.md")
# The techniques that the founding articles name.
NAMED = ["clipping by norm", "clipping by value", "L1", "L2", "activation penalties", "batch norm"]
NAMED += ["dropout", "initialisation", "activation functions", "learning rate schedule"]
NAMED += ["dynamic adjustment", "data normalisation", "augmentation", "early stopping"]
NAMED += ["distributed training"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_rank(folder: Path) -> Iterator[None]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scope(folder: Path) -> dict[str, Any]:
    """Return the names that the pages use without defining them."""
    model = network(norm=True)
    given = list(batches(4))
    return {
        **{"sg": sg, "torch": torch, "nn": nn, "dist": dist, "swa_utils": swa_utils},
        **{
            "model": model,
            "loss_of": loss_of,
            "batches": given,
            "x": given[0][0],
            "folder": folder,
        },
        **{"layer": nn.Linear(64, 10), "depth": 12},
        "loader": torch.utils.data.DataLoader(dataset(4), batch_size=BATCH),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }


def test_every_remedy_of_the_articles_has_a_line() -> None:
    assert len(REMEDIES) >= 38
    for named in NAMED:
        assert any(remedy.startswith(named) for remedy in REMEDIES), named
    assert set(snippets("remedies.md")) == {
        "Accumulation and decay",
        "Early stopping in a plain loop",
    }


@pytest.mark.parametrize("remedy", REMEDIES)
def test_the_line_of_a_remedy(remedy: str, folder: Path, request: pytest.FixtureRequest) -> None:
    line, names = REMEDIES[remedy], scope(folder)
    if "DistributedDataParallel" in line or "process_group" in line:
        request.getfixturevalue("one_rank")
    loss_of(names["model"], names["batches"][0]).backward()
    with ExitStack() as stack:
        if "v2." in line:
            names["v2"] = stack.enter_context(vision("torchvision.transforms.v2"))[0]
        if "EarlyStopping(" in line:
            names["EarlyStopping"] = pytest.importorskip(
                "lightning"
            ).pytorch.callbacks.EarlyStopping
        if "EarlyStoppingCallback(" in line:
            names["EarlyStoppingCallback"] = pytest.importorskip(
                "transformers"
            ).EarlyStoppingCallback
        made = eval(line, names)
        if "v2." in line:
            assert made(torch.rand(1, 28, 28)).shape == (1, 28, 28)
    if isinstance(made, torch.optim.Optimizer):
        before = [p.detach().clone() for p in names["model"].parameters()]
        made.step()
        after = names["model"].parameters()
        assert any(not torch.equal(p, b) for p, b in zip(after, before, strict=True))
    elif isinstance(made, nn.Sequential) and made is not names["model"]:
        assert torch.isfinite(made(names["x"])).all()
    elif isinstance(made, torch.Tensor):
        assert torch.isfinite(made).all()


def test_accumulation_on_the_page(folder: Path) -> None:
    names = scope(folder)
    exec(snippets("remedies.md")["Accumulation and decay"], names)
    optimizer = names["optimizer"]
    assert optimizer.skipped_steps == 0 and 0 < float(optimizer.grad_norm) < 10
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_early_stopping_on_the_page(folder: Path) -> None:
    losses = [5.0, 4.0, 3.0, 3.5, 2.9, 3.0, 3.1, 2.95, 3.2, 3.0, 1.0, 0.5]
    left = iter(losses)
    names = {**scope(folder), "train_and_validate": lambda model: next(left)}
    exec(snippets("remedies.md")["Early stopping in a plain loop"], names)
    assert names["best"] == 2.9 and names["epoch"] == 9


@pytest.mark.parametrize("title", INTEGRATIONS)
def test_a_snippet_of_the_integrations(
    title: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = scope(folder)
    steps = 4
    with ExitStack() as stack:
        if title == "Lightning":
            names["pl"] = pytest.importorskip("lightning").pytorch
            from steadygrad.integrations.lightning import StabilizerMonitor

            names["StabilizerMonitor"] = StabilizerMonitor
            names["logger"] = names["pl"].loggers.CSVLogger(folder)
            steps = 8
        elif title.startswith("Hugging Face"):
            transformers = pytest.importorskip("transformers")
            from steadygrad.integrations.transformers import StabilizerCallback

            names["StabilizerCallback"] = StabilizerCallback
            for name in ("Trainer", "TrainingArguments"):
                names[name] = getattr(transformers, name)
            names.update(folder=str(folder), gpt=language_model(), text=Text(32))
            steps = 2
        elif title == "accelerate":
            accelerate = pytest.importorskip("accelerate")
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
            accelerate.state.GradientState._reset_state()
            names["Accelerator"] = accelerate.Accelerator
            steps = 2
        elif title.startswith("timm"):
            parts = ("timm", "timm.optim", "timm.scheduler", "timm.utils")
            names["timm"] = stack.enter_context(vision(*parts))[0]
            # timm's models have this method.
            names["model"].get_classifier = lambda: names["model"][-1]
        exec(compile(INTEGRATIONS[title], title, "exec"), names)
    optimizer = names.get("optimizer")
    if title == "Lightning":
        optimizer = names["trainer"].optimizers[0]
        assert "steps 0 to 7" in capsys.readouterr().out
        assert optimizer.telemetry.names[0] == "model.0.weight"
    assert isinstance(optimizer, torch.optim.Optimizer)
    if title == "timm's AGC":
        groups = [
            (len(group["params"]), group["weight_decay"], group["clipping"])
            for group in optimizer.param_groups
        ]
        assert sum(count for count, _, clipping in groups if clipping is None) == 2
        assert sorted({(decay, clipping) for _, decay, clipping in groups}, key=str) == [
            (0.0, 0.01),
            (0.0, None),
            (0.05, 0.01),
            (0.05, None),
        ]
    # timm's lamb counts in the group.
    counts = [holder.get("step") for holder in (*optimizer.state.values(), *optimizer.param_groups)]
    assert {int(count) for count in counts if count is not None} == {steps}
    assert optimizer.skipped_steps == 0 and float(optimizer.grad_norm) > 0
