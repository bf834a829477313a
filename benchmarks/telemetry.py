"""Time optimizer steps with and without telemetry, interleaved: `python -m benchmarks.telemetry`.

Each arm has its own parameters, gradients and state. The arm without telemetry runs twice; the
difference of the two is noise. Ratios are taken within each round, and their median is reported: a
machine that changes its pace disturbs it less than a ratio of medians. The program prints one JSON
object, or writes it to `--out`.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import steadygrad as sg
from benchmarks.candidates import Workload
from benchmarks.environment import write_report
from benchmarks.shapes import ModelShapes, many_small, resnet50
from benchmarks.timer import Candidate, Race

_ARMS: dict[str, Any] = {"none": None, "none, again": None, "global": "global", "tensor": "tensor"}


def measure(shapes: ModelShapes, max_norm: float, rounds: int) -> dict[str, Any]:
    """Return median and ratio of each arm; the ratio is to the mean of the two arms without telemetry."""
    arms = []
    for name, level in _ARMS.items():
        params = Workload(shapes).params
        optimizer = sg.optim.AdamW(params, lr=1e-6, max_norm=max_norm, telemetry=level)
        arms.append(Candidate(name, optimizer.step))
    race = Race(arms)
    race.warm_up(3)
    laps = {timing.name: timing for timing in race.run(0.0, rounds, rounds)}
    # The place of an arm's memory also makes a difference of some percent, so the two are averaged.
    none = [sum(pair) / 2 for pair in zip(laps["none"].wall, laps["none, again"].wall, strict=True)]
    return {
        name: {
            "median_ms": 1e3 * timing.median(),
            "ratio": statistics.median(a / b for a, b in zip(timing.wall, none, strict=True)),
        }
        for name, timing in laps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file to write to instead of the terminal")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases = {
        f"{shapes.title}, {clips}": measure(shapes, max_norm, given.rounds)
        for shapes in (resnet50(), many_small())
        for clips, max_norm in (("clip not active", 1e9), ("clip active", 1e-3))
    }
    write_report(given.out, threads=given.threads, rounds=given.rounds, cases=cases)


if __name__ == "__main__":
    main()
