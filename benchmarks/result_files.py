"""Where result files are, what they are called, and which is the newest of each machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Result = dict[str, Any]


def machine_of(result: Result) -> str:
    """The GPU's name, or the CPU's with its cores."""
    environment = result["environment"]
    if gpu := environment.get("gpu"):
        return str(gpu["name"])
    return f"{environment['cpu']}, {environment['cores']} cores"


def file_name(result: Result) -> str:
    """Such as `nvidia-h200-2026-01-31.json`."""
    machine = re.sub(r"[^a-z0-9]+", "-", machine_of(result).lower()).strip("-")
    return f"{machine}-{result['created'][:10]}.json"


def newest_results(folder: Path = RESULTS) -> dict[str, Result]:
    """The newest result of each machine, by the machine's name. Rehearsals do not count."""
    newest: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("rehearsal"):
            continue
        machine = machine_of(result)
        if machine not in newest or newest[machine]["created"] < result["created"]:
            newest[machine] = result
    return dict(sorted(newest.items()))
