"""Executes the README and the pages of the guide as they are: every block of a page, one after the other."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/index.md", "docs/clipping.md", "docs/penalties.md"]
PAGES += ["docs/half_precision.md", "docs/accumulation.md", "docs/batch_norm.md"]
PAGES += ["docs/checkpoints.md"]


@pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning",
    "ignore:load_state_dict. the checkpoint's limits replace:UserWarning",
)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_it_stands(
    page: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL
    )
    assert blocks
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)
    if page == "README.md":
        assert "exploded  step 37: 0.weight" in capsys.readouterr().out
