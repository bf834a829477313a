"""Describe what a measurement depends on: machine, versions, caches, free memory and source.

`python -m benchmarks.environment FILE` writes the description as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import steadygrad as sg
from steadygrad.doctor import cpu_name, cuda_version

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"
# This variable names the commit if the files came without their history.
REVISION_VARIABLE = "STEADYGRAD_REVISION"
# If the system does not tell its cache size, this one is assumed. It is larger than most, because
# rotating buffers too often does no harm.
_DEFAULT_CACHE_BYTES = 64 * 2**20


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _printed(*command: str, folder: Path | None = None) -> str:
    """Return what a command prints; "" if it fails or is missing."""
    options: dict[str, Any] = {"check": True, "capture_output": True, "text": True, "timeout": 20}
    try:
        return str(subprocess.run(command, cwd=folder, **options).stdout).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def git(folder: Path, *arguments: str) -> str:
    """Return what git prints in `folder`; "" if it fails or is missing."""
    # A copied checkout may belong to another user, which git refuses unless told otherwise.
    return _printed("git", "-c", "safe.directory=*", *arguments, folder=folder)


def cache_bytes() -> int:
    """Return the size of the first core's largest cache in bytes; 64 MiB if it is unknown."""
    texts = (_read(f"/sys/devices/system/cpu/cpu0/cache/index{n}/size") for n in range(8))
    found = (re.fullmatch(r"(\d+)([KM])\s*", text) for text in texts)
    sizes = (int(m[1]) * {"K": 2**10, "M": 2**20}[m[2]] for m in found if m)
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """Return the free memory within the container's limit; all memory if nothing is known."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    available = int(match.group(1)) * 1024 if match else _memory_bytes()
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    used = _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        available = min(available, int(limit) - int(used))
    return available


def cuda_info() -> dict[str, Any]:
    """Return what the extension says about CUDA; empty if it was built without CUDA."""
    found: Any = sg._kernels.build_info().get("cuda", {})
    return dict(found) if found.get("compiled") else {}


def cuda_problem() -> str:
    """Return why no CUDA device can be measured; "" if one can."""
    info = cuda_info()
    if not info:
        return "steadygrad was built without CUDA"
    if info["problem"]:
        return str(info["problem"])
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; is it a build for the CPU?"
    if not info["devices"][torch.cuda.current_device()]["usable"]:
        return f"the kernels were compiled for {info['architectures']}, not for this device"
    return ""


def nvcc_version() -> str:
    """Return the version of the nvcc that a build would find, such as "13.0.88"."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    program = shutil.which("nvcc") or f"{home}/bin/nvcc"
    match = re.search(r"\bV(\d[\d.]*)", _printed(program, "--version"))
    return match.group(1) if match else UNKNOWN


def this_gpu() -> dict[str, Any]:
    """Describe the current CUDA device.

    `kernels_runtime` is the CUDA version that steadygrad's kernels were compiled with, `torch_cuda`
    the version that torch was compiled with.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": (_printed("nvidia-smi", *query).split() or [UNKNOWN])[0],
        "torch_cuda": str(torch.version.cuda),
        "kernels_runtime": cuda_version(cuda_info().get("runtime_version", 0)),
        "nvcc": nvcc_version(),
    }


def busy_cores(seconds: float = 0.3) -> float:
    """Return how many cores are busy, on average, while this process sleeps for a moment.

    The load average would still count a build that has ended; it serves where there is no `/proc/stat`.
    """
    samples = []
    for pause in (seconds, 0.0):
        try:
            cpu, *_ = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return os.getloadavg()[0]
        # User, nice, system, idle, waiting for a disk, two kinds of interrupts, and stolen by another machine.
        samples.append(np.array(cpu.split()[1:9], dtype=float))
        time.sleep(pause)
    passed = samples[1] - samples[0]
    idle = passed[3:5].sum() / max(passed.sum(), 1.0)
    return (os.cpu_count() or 1) * float(1 - idle)


def this_machine(gpu: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe this machine and process, and the GPU if the run is on one.

    `cache_bytes` is the size of the last-level cache in front of the measured memory; `load` is the
    number of cores that are busy with something else.
    """
    return {
        "device": "cpu" if gpu is None else "cuda",
        "machine": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes() if gpu is None else gpu["l2_bytes"],
        "memory_bytes": _memory_bytes(),
        "load": busy_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steadygrad": sg.__version__,
        **this_source(),
        "gpu": gpu,
    }


def tree_name(folder: Path) -> bytes:
    """Return the 20-byte hash that git would give the tree of `folder`; b"" if it has no files.

    Files that builds leave behind, and empty folders, do not count.
    """
    entries: list[tuple[bytes, bytes]] = []
    for path in folder.iterdir():
        key, mode, name = path.name.encode(), b"100644 ", b""
        if path.is_dir() and path.name != "__pycache__":
            # git sorts folders as if their names ended in a slash.
            name, mode, slash = tree_name(path), b"40000 ", b"/"
        elif path.is_file() and path.suffix not in {".o", ".pyc", ".so"}:
            name, slash = _named(b"blob", path.read_bytes()), b""
            mode = b"100755 " if path.stat().st_mode & 0o100 else mode
        if name:
            entries.append((key + slash, mode + key + b"\0" + name))
    return _named(b"tree", b"".join(entry for _, entry in sorted(entries))) if entries else b""


def _named(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).digest()


def this_source(root: Path = ROOT) -> dict[str, str]:
    """Describe a checkout.

    Returns:
        A dictionary of three entries. `revision` is the commit, with "-dirty" if files differ;
        without git's history it is what STEADYGRAD_REVISION says, or "unknown". `csrc_tree` is the
        hash that git gives the files in csrc as they are, which `git rev-parse HEAD:csrc` prints
        once they are committed. `csrc_state` is "committed", "uncommitted changes", or "unknown"
        without history.
    """
    files = tree_name(root / "csrc").hex()
    # A checkout inside another repository has no history of its own.
    top = git(root, "rev-parse", "--show-toplevel")
    revision = git(root, "rev-parse", "HEAD") if top and Path(top).resolve() == root else ""
    if not revision:
        revision, state = os.environ.get(REVISION_VARIABLE, UNKNOWN), UNKNOWN
    else:
        revision += "-dirty" if git(root, "status", "--porcelain") else ""
        committed = git(root, "rev-parse", "HEAD:csrc") == files
        state = "committed" if committed else "uncommitted changes"
    return {"revision": revision, "csrc_tree": files, "csrc_state": state}


if __name__ == "__main__":
    machine = this_machine(None if cuda_problem() else this_gpu())
    Path(sys.argv[1]).write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")
