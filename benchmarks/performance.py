"""Writes docs/performance.md from the newest result file of each machine: `make performance`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks import result_tables
from benchmarks.result_files import RESULTS, Result, newest_results

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
The *floor* is what our path has to move per element with no help from caches. GB/s are floor bytes over time, the
share is that of the bandwidth which a plain copy reached in the same rounds (on a CPU the faster of a copy and an
in-place multiplication), and a ratio above 1 says how many times faster ours is than the peer.
"""

_NO_CUDA = """\
## CUDA

CUDA: not measured: no GPU was at hand; the kernels have been compiled and have run in the emulator only.
"""


def page(results: dict[str, Result], csrc_tree: str | None) -> str:
    """The page.

    Args:
        results: the newest result of each machine.
        csrc_tree: git's name for the kernels as they are now; None where git does not say.
    """
    parts = [_INTRODUCTION]
    gpus = {name: result for name, result in results.items() if _gpu(result)}
    if not gpus:
        parts.append(_NO_CUDA)
    others = {name: result for name, result in results.items() if name not in gpus}
    parts += [_machine(name, result, csrc_tree) for name, result in {**gpus, **others}.items()]
    return "\n".join(parts)


def settled(text: str) -> str:
    """The page without the lines that the next commit may change."""
    return re.sub(rf"^{re.escape(STALENESS)}.*\n\n", "", text, flags=re.MULTILINE)


def present_tree() -> str | None:
    """Git's name for the committed kernels, or None."""
    command = ["git", "-c", "safe.directory=*", "rev-parse", "HEAD:csrc"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpu(result: Result) -> dict[str, str] | None:
    gpu: dict[str, str] | None = result["environment"].get("gpu")
    return gpu


def _machine(name: str, result: Result, csrc_tree: str | None) -> str:
    environment, gpu = result["environment"], _gpu(result)
    lines = [f"## {name}", ""]
    if gpu:
        lines += [
            f"{gpu['architecture']}, {gpu['multiprocessors']} multiprocessors, driver {gpu['driver']}, "
            f"CUDA {gpu['torch_cuda']} in torch and {gpu['kernels_runtime']} in the kernels, "
            f"nvcc {gpu['nvcc']}; host {environment['cpu']}.",
            "",
        ]
    else:
        cache = environment["cache_bytes"] / 2**20
        lines += [f"{environment['threads']} threads, last-level cache {cache:.0f} MiB.", ""]
    revision = environment["revision"] or "unknown"
    bandwidth = result["copy_bandwidth"]
    copies = f"`copy_` {bandwidth['copy_gigabytes_per_second']:,.0f} GB/s"
    if (scaled := bandwidth["mul_gigabytes_per_second"]) is not None:
        copies += f", `mul_` {scaled:,.0f} GB/s"
    lines += [
        f"Measured {result['created'][:10]} with torch {environment['torch']}, Python "
        f"{environment['python']}, at revision {revision}. Copy bandwidth: {copies}.",
        "",
        *_age(environment, csrc_tree),
        *_floors(result["targets"]),
    ]
    if gpu:
        lines += [
            "Times are GPU time; wall marks those of a step in a loop that waits for the GPU at its end, "
            "where the host's work counts.",
            "",
        ]
    for operation, cases in result_tables.operations(result).items():
        lines += _operation(operation, cases, result_tables.means(result, operation))
    if result["skipped"]:
        left_out = "; ".join(f"{entry['case']} ({entry['reason']})" for entry in result["skipped"])
        lines += [f"Not measured: {left_out}.", ""]
    return "\n".join(lines)


def _age(environment: Result, csrc_tree: str | None) -> list[str]:
    measured = environment.get("csrc_tree") or "unknown"
    if measured == "unknown":
        unknown = "The file does not say which kernels it measured, so they may be older than those of today."
        return [unknown, ""]
    if csrc_tree is None or measured == csrc_tree:
        return []
    return [
        f"{STALENESS}**: they are of `csrc` at {measured[:12]}, which is now at {csrc_tree[:12]}.",
        "",
    ]


def _floors(targets: list[Result]) -> list[str]:
    if not targets:
        return []
    table = result_tables.targets_table(targets)
    return [result_tables.targets_sentence(targets), "", table.markdown(), ""]


def _operation(title: str, cases: list[Result], means: list[Result]) -> list[str]:
    table = result_tables.operation_table(cases, bool(means))
    lines = [f"### {title}", "", result_tables.floor(cases), "", table.markdown(), ""]
    if means:
        lines += [result_tables.means_sentence(means), ""]
    return lines


def main() -> int:
    text = page(newest_results(RESULTS), present_tree())
    PAGE.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
