"""Times optimizer steps with telemetry beside steps without, in one process, interleaved.

Each arm has parameters, gradients and state of its own; the arms take turns, in another order each round, so that every
step finds the caches as the others have left them. Ratios are medians over rounds of a round's own ratio, which a
machine that changes its pace disturbs less than a ratio of medians. Prints one JSON object, or writes it to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steadygrad as sg
from benchmarks.environment import this_machine
from benchmarks.shapes import ModelShapes, many_small, resnet50
from steadygrad.telemetry.settings import Level

_NONE = "none"
_TWIN = "none, again"  # what differs here is noise
_LEVELS: dict[str, Any] = {_NONE: None, _TWIN: None, "global": "global", "tensor": "tensor"}


def _stepping(shapes: ModelShapes, level: Level | None, max_norm: float) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes.shapes:
        param = nn.Parameter(torch.randn(shape, generator=generator))
        param.grad = torch.randn(shape, generator=generator)
        params.append(param)
    return sg.optim.AdamW(params, lr=1e-6, max_norm=max_norm, telemetry=level).step


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _measure(shapes: ModelShapes, max_norm: float, rounds: int) -> dict[str, Any]:
    calls = {name: _stepping(shapes, level, max_norm) for name, level in _LEVELS.items()}
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            times[name].append(_seconds(calls[name]))
    # Of both: where an arm's memory happens to lie makes a difference of percents, too.
    none = [sum(pair) / 2 for pair in zip(times[_NONE], times[_TWIN], strict=True)]
    return {
        name: {
            "median_ms": 1e3 * statistics.median(spent),
            "ratio": statistics.median(a / b for a, b in zip(spent, none, strict=True)),
        }
        for name, spent in times.items()
    }


def main() -> None:
    """Measures all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a file, in the place of the terminal")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases = {}
    for shapes in (resnet50(), many_small()):
        for clips, max_norm in (("clip not active", 1e9), ("clip active", 1e-3)):
            cases[f"{shapes.title}, {clips}"] = _measure(shapes, max_norm, given.rounds)
    report = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": asdict(this_machine()),
        "threads": given.threads,
        "rounds": given.rounds,
        "cases": cases,
    }
    text = json.dumps(report, indent=2) + "\n"
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
