"""Writes docs/performance.md from the newest result file of each machine: `make performance`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.environment import UNKNOWN, git
from benchmarks.results import Result, newest_results, operations
from benchmarks.tables import floor, operation_markdown, targets_markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"

# Lines that depend on the state of the kernels, and not only on the result files, begin with this.
STALENESS = "**These figures are older than the kernels"

_INTRODUCTION = """\
# Performance

Written by `make performance` from the newest file of each machine in
[benchmarks/results](https://github.com/steadygrad/steadygrad/tree/main/benchmarks/results); do not edit.
`make bench` measures a CPU, `make gpu` a GPU.

Ours and torch's run side by side in one process, in turns; times are medians, fp32 unless a table says otherwise.
The *floor* is what our path has to move per element with no help from caches, and MB are that of a whole call. GB/s
are floor bytes over time, the share is that of the bandwidth which a plain copy reached in the same rounds (on a CPU
the faster of a copy and an in-place multiplication), and a ratio above 1 says how many times faster ours is than the
peer.
"""

_NO_CUDA = """\
## CUDA

CUDA: not measured: no GPU was at hand; the kernels have been compiled and have run in the emulator only.
"""


def page(results: dict[str, Result], csrc_tree: str | None) -> str:
    """Write the page.

    Args:
        results: the newest result of each machine.
        csrc_tree: git's name for the kernels as they are now; None where git does not say.
    """
    gpus = {name: result for name, result in results.items() if result["environment"].get("gpu")}
    machines = [_machine(name, result, csrc_tree) for name, result in {**gpus, **results}.items()]
    return "\n".join([_INTRODUCTION, *(() if gpus else (_NO_CUDA,)), *machines])


def settled(text: str) -> str:
    """Return the page without the lines that the next commit may change."""
    return re.sub(rf"^{re.escape(STALENESS)}.*\n\n", "", text, flags=re.MULTILINE)


def _machine(name: str, result: Result, csrc_tree: str | None) -> str:
    environment, gpu = result["environment"], result["environment"].get("gpu")
    bandwidth = result["copy_bandwidth"]
    copies = f"`copy_` {bandwidth['copy_gigabytes_per_second']:,.0f} GB/s"
    if (scaled := bandwidth["mul_gigabytes_per_second"]) is not None:
        copies += f", `mul_` {scaled:,.0f} GB/s"
    cache = environment["cache_bytes"] / 2**20
    where = f"{environment['threads']} threads, last-level cache {cache:.0f} MiB."
    if gpu:
        where = (
            f"{gpu['architecture']}, {gpu['multiprocessors']} multiprocessors, driver {gpu['driver']}, "
            f"CUDA {gpu['torch_cuda']} in torch and {gpu['kernels_runtime']} in the kernels, "
            f"nvcc {gpu['nvcc']}; host {environment['cpu']}. Times are GPU time; wall marks those of "
            "a step in a loop that waits for the GPU at its end, where the host's work counts."
        )
    parts = [
        f"## {name}",
        where,
        f"Measured {result['created'][:10]} with torch {environment['torch']}, Python "
        f"{environment['python']}, at revision {environment['revision'] or UNKNOWN}. Copy bandwidth: {copies}.",
        *_age(environment, csrc_tree),
    ]
    if targets := result["targets"]:
        met = sum(target["met"] is True for target in targets)
        parts += [f"Floors: {met} of {len(targets)} met.", targets_markdown(targets)]
    for operation, cases in operations(result["cases"]).items():
        parts += [f"### {operation}", f"{floor(cases)}.", operation_markdown(cases)]
        means = [
            f"{entry['mean']:.2f} against {entry['peer']} over {entry['cases']} cases, "
            f"at least {entry['least']:.2f} ({entry['least_case']})"
            for entry in result.get("summaries", ())  # older files have none
            if entry["title"] == operation
        ]
        if means:
            parts.append(f"Geometric means: {'; '.join(means)}.")
    if result["skipped"]:
        left_out = "; ".join(f"{entry['case']} ({entry['reason']})" for entry in result["skipped"])
        parts.append(f"Not measured: {left_out}.")
    return "\n\n".join(parts) + "\n"


def _age(environment: Result, csrc_tree: str | None) -> list[str]:
    measured = environment.get("csrc_tree") or UNKNOWN
    if measured == UNKNOWN:
        return [
            "The file does not say which kernels it measured, so they may be older than those of today."
        ]
    if csrc_tree is None or measured == csrc_tree:
        return []
    return [
        f"{STALENESS}**: they are of `csrc` at {measured[:12]}, which is now at {csrc_tree[:12]}."
    ]


def main() -> int:
    text = page(newest_results(), git(ROOT, "rev-parse", "HEAD:csrc"))
    PAGE.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
