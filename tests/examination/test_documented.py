"""Runs the Python code of docs/examine.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import steadygrad as sg
from tests.digit_training import BATCH, batches, dataset, loss_of, network
from tests.integrations.documented_snippets import snippets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.integration
@pytest.mark.parametrize("title", snippets("examine.md"))
def test_a_snippet(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    model = network()
    torch.save(model.state_dict(), "before.pt")
    given = list(batches(3))
    if title == "Use 3":
        given[1][0][0, 0] = torch.nan
    names: dict[str, Any] = {
        **{"sg": sg, "torch": torch, "model": model, "loss_of": loss_of, "batches": given},
        "loader": torch.utils.data.DataLoader(dataset(3), batch_size=BATCH),
    }
    exec(compile(snippets("examine.md")[title], title, "exec"), names)
    found = names["found"]
    assert len(found.losses) == (1 if title == "Use 3" else 3)
    assert bool(found.verdicts) is (title == "Use 3") or found.trials
    if title == "Use":
        assert Path("gains.png").exists()
        assert names["optimizer"].max_norm == found.max_norm
