"""Read result files, summarise groups of cases, and judge whether floors were met.

A result is the JSON that `python -m benchmarks --out FILE` writes. Tables, page and
docs/performance.md are made from results alone.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import batch_norm as norms
from benchmarks import candidates as sides
from benchmarks.cases import CASES, CUDA_CASES
from study.record import read_json

RESULTS = Path(__file__).resolve().parent / "results"
# The number is raised when a key changes its meaning.
SCHEMA = 3

# A result file, or a case, peer, summary or target in it.
Result = dict[str, Any]

# Stands in place of a peer for the fastest of torch's candidates in each case.
FASTEST = "fastest of torch's"
# Stands in place of a peer for the copy bandwidth.
COPY = "copy bandwidth"
# Name of what is compared over a group of cases.
MEAN = "geometric mean"
SLOWEST = "slowest case"


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        ValueError: The file cannot be read, or is no result of the benchmark.
    """
    expected = f"a result of the benchmark with schema 1 to {SCHEMA}"
    return read_json(path, expected, range(1, SCHEMA + 1), "cases")


def machine_of(result: Result) -> str:
    """Return the name of the GPU, or the name and cores of the CPU."""
    environment = result["environment"]
    gpu = environment.get("gpu")
    return str(gpu["name"]) if gpu else f"{environment['cpu']}, {environment['cores']} cores"


def file_name(result: Result) -> str:
    """Return a name such as `nvidia-h200-2026-01-31.json`."""
    machine = re.sub(r"[^a-z0-9]+", "-", machine_of(result).lower()).strip("-")
    return f"{machine}-{result['created'][:10]}.json"


def newest_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Return the newest result of each machine, by name of machine; rehearsals do not count."""
    newest: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machine = machine_of(result)
        if result.get("rehearsal") or newest.get(machine, result)["created"] > result["created"]:
            continue
        newest[machine] = result
    return dict(sorted(newest.items()))


def operations(cases: Iterable[Result]) -> dict[str, list[Result]]:
    """Return the cases by name of operation, in their order."""
    found: dict[str, list[Result]] = {}
    for case in cases:
        found.setdefault(case["operation"], []).append(case)
    return found


def summaries(cases: Iterable[Result]) -> list[Result]:
    """Compare ours with each peer over the cases of an operation, and with the fastest of several.

    Returns:
        The geometric mean and the smallest of the ratios to each peer, for operations whose cases
        are alike.
    """
    found = []
    averaged = (case for case in cases if case.get("averaged") and case["peers"])
    for members in operations(averaged).values():
        ratios: dict[str, dict[str, float]] = {}
        for case in members:
            own = {peer["name"]: peer["ratio"] for peer in case["peers"]}
            torchs = [own[name] for name in own if not name.startswith(sides.OURS)]
            own[FASTEST] = min(torchs, default=min(own.values()))
            for name, ratio in own.items():
                ratios.setdefault(name, {})[case["key"]] = ratio
        if len(ratios) == 2:  # the only peer is the fastest
            del ratios[FASTEST]
        for peer, by_case in ratios.items():
            least = min(by_case, key=by_case.__getitem__)
            mean = statistics.geometric_mean(by_case.values())
            told = {"group": least.partition("/")[0], "title": members[0]["operation"]}
            told |= {"peer": peer, "cases": len(by_case), "mean": mean}
            found.append({**told, "least": by_case[least], "least_case": least})
    return found


class Target(NamedTuple):
    """Describes a floor that maintainers hold the benchmark to."""

    name: str  # name of a case or a group
    peer: str
    at_least: float  # smallest ratio to the peer, or smallest share of `COPY`
    over: str = ""  # what is compared over a group


def _fusion(group: str, mean: float, *names: str) -> Iterator[Target]:
    """Yield targets: `mean` against each peer, and no case slower than any peer."""
    for name in names:
        yield Target(group, name, mean, MEAN)
    yield Target(group, FASTEST if len(names) > 1 else names[0], 1.0, SLOWEST)


_CUDNN = (norms.CUDNN, norms.NATIVE)
_IN_PLACE = (norms.CUDNN_IN_PLACE, norms.NATIVE_IN_PLACE)

TARGETS: tuple[Target, ...] = (
    Target("clip_active/resnet50", sides.TORCH_FOREACH, 1.5),
    Target("clip_inactive/resnet50", sides.TORCH_FOREACH, 2.8),
    Target("clip_active/small", sides.TORCH_FOREACH, 10.0),
    Target("clip_inactive/small", sides.TORCH_FOREACH, 10.0),
    Target("adamw/resnet50", sides.CLIP_FUSED, 1.4),
    Target("adamw/gpt2", sides.CLIP_FUSED, 1.2),
    Target("adamw/small", sides.CLIP_FUSED, 20.0),
    Target("adamw/resnet50", sides.CLIP_DEFAULT, 3.0),
    Target("adamw/gpt2", sides.CLIP_DEFAULT, 3.0),
    *_fusion("batch_norm", 1.5, norms.TORCH),
    *_fusion("batch_norm_relu", 1.8, norms.TORCH, norms.TORCH_IN_PLACE),
    *_fusion("batch_norm_add_relu", 2.0, norms.TORCH, norms.TORCH_IN_PLACE),
)

CUDA_TARGETS: tuple[Target, ...] = (
    Target("clip_inactive/one_2e28", sides.TORCH_FOREACH, 2.5),
    Target("clip_inactive/one_2e28", COPY, 0.9),
    Target("clip_active/one_2e28", sides.TORCH_FOREACH, 1.05),
    Target("clip_active/one_2e28", COPY, 0.9),
    Target("adamw/gpt2", sides.CLIP_FUSED, 1.2),
    Target("adamw/one_2e28", sides.CLIP_FUSED, 1.2),
    Target("adamw/gpt2", sides.FUSED_FOLDED, 1.08),
    Target("adamw/resnet50", sides.CLIP_FUSED, 2.0),
    Target("adamw/small", sides.CLIP_FUSED, 5.0),
    *_fusion("batch_norm", 1.3, *_CUDNN),
    *_fusion("batch_norm_relu", 2.0, *_CUDNN, *_IN_PLACE),
    *_fusion("batch_norm_add_relu", 2.0, *_CUDNN, *_IN_PLACE),
)


def judge(cases: Sequence[Result], device: str = "cpu") -> list[Result]:
    """Return what was measured for each target of a device, "cpu" or "cuda", in their order.

    `met` is None if the target was not measured over all cases of its group.
    """
    measured: dict[tuple[str, str, str], tuple[float, int]] = {}
    for case in cases:
        for peer in case["peers"]:
            measured[case["key"], peer["name"], ""] = peer["ratio"], 1
        if case["share_of_copy"] is not None:
            measured[case["key"], COPY, ""] = case["share_of_copy"], 1
    for entry in summaries(cases):
        measured[entry["group"], entry["peer"], MEAN] = entry["mean"], entry["cases"]
        measured[entry["group"], entry["peer"], SLOWEST] = entry["least"], entry["cases"]
    sizes = Counter(case.group for case in (CUDA_CASES if device == "cuda" else CASES))
    found = []
    for name, peer, at_least, over in CUDA_TARGETS if device == "cuda" else TARGETS:
        ratio, count = measured.get((name, peer, over), (None, 0))
        size = sizes[name] if over else 1
        met = None if ratio is None or count < size else ratio >= at_least
        told = {"case": f"{name}, {over}" if over else name, "peer": peer, "at_least": at_least}
        found.append({**told, "measured": ratio, "met": met, "cases": count, "of": size})
    return found
