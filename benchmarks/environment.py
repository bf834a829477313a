"""What a measurement depends on: machine, versions, caches, free memory, and which source was measured.

`python -m benchmarks.environment FILE` writes it as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import steadygrad as sg

UNKNOWN = "unknown"
# Names the commit where the files came without their history.
REVISION_VARIABLE = "STEADYGRAD_REVISION"
# Assumed where the system does not say: larger than most, so buffers rather rotate once too often.
_DEFAULT_CACHE_BYTES = 64 * 2**20


class Source(NamedTuple):
    """Where the code came from.

    `revision` is the commit of the checkout that the command runs in, with "-dirty" when files differ; outside one the
    commit that the package was built from; else "unknown". `csrc_tree` is git's name for the files in csrc as they are:
    what `git rev-parse HEAD:csrc` gives once they are committed; "unknown" without them. `csrc_state` is "committed",
    "uncommitted changes", or "unknown" without git's history.
    """

    revision: str
    csrc_tree: str
    csrc_state: str


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _printed(*command: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints in `folder`; None where it fails, is missing, or prints nothing."""
    # A copied checkout may belong to another user, which git refuses unless told otherwise.
    return _printed("git", "-c", "safe.directory=*", *arguments, folder=folder) or None


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Return the size of the first core's largest cache in bytes; 64 MiB where the system does not say."""
    texts = (_read(f"/sys/devices/system/cpu/cpu0/cache/index{n}/size") for n in range(8))
    found = (re.fullmatch(r"(\d+)([KM])\s*", text) for text in texts)
    sizes = (int(m[1]) * {"K": 2**10, "M": 2**20}[m[2]] for m in found if m)
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def available_memory_bytes() -> int:
    """Return the memory free to take, within the container's limit; all memory where nothing is known."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    available = int(match.group(1)) * 1024 if match else _memory_bytes()
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    used = _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        available = min(available, int(limit) - int(used))
    return available


def cuda_info() -> dict[str, Any]:
    """Return what the extension says about CUDA; empty where it was built without."""
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


def _cuda_version(number: int) -> str:
    """Write 13000 as "13.0"; "none" for 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def nvcc_version() -> str:
    """Return the version of the nvcc that a build would find, such as "13.0.88"."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for program in ("nvcc", f"{home}/bin/nvcc"):
        if match := re.search(r"\bV(\d[\d.]*)", _printed(program, "--version")):
            return match.group(1)
    return UNKNOWN


def this_gpu() -> dict[str, Any]:
    """Describe the current CUDA device.

    `kernels_runtime` is the CUDA version that steadygrad's kernels were compiled with, `torch_cuda` the one of torch's.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    info = cuda_info()
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    drivers = _printed("nvidia-smi", *query).split()
    return {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": drivers[0] if drivers else f"CUDA {_cuda_version(info.get('driver_version', 0))}",
        "torch_cuda": str(torch.version.cuda),
        "kernels_runtime": _cuda_version(info.get("runtime_version", 0)),
        "nvcc": nvcc_version(),
    }


def this_machine(gpu: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe this machine and process, and the GPU if the run is on one.

    `cache_bytes` is the size of the last-level cache in front of the memory that is measured; `load` is the one-minute
    load average, 0 where there is none; the rest of the source is as in `Source`.
    """
    return {
        "device": "cpu" if gpu is None else "cuda",
        "machine": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes() if gpu is None else gpu["l2_bytes"],
        "memory_bytes": _memory_bytes(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steadygrad": sg.__version__,
        **this_source()._asdict(),
        "gpu": gpu,
    }


def tree_name(folder: Path) -> str:
    """Return the name that git would give the files in `folder`, which need not be under git.

    Files that builds leave behind, and empty folders, do not count.
    """
    name = _tree(folder)
    return name.hex() if name else UNKNOWN


def _tree(folder: Path) -> bytes:
    entries: list[tuple[bytes, bytes]] = []
    for path in folder.iterdir():
        key = path.name.encode()
        if path.name == "__pycache__" or path.suffix in {".o", ".pyc", ".so"}:
            continue
        if path.is_dir():
            if name := _tree(path):
                # git sorts folders as if their names ended in a slash.
                entries.append((key + b"/", b"40000 " + key + b"\0" + name))
            continue
        mode = b"100755 " if path.stat().st_mode & 0o100 else b"100644 "
        entries.append((key, mode + key + b"\0" + _named(b"blob", path.read_bytes())))
    return _named(b"tree", b"".join(entry for _, entry in sorted(entries))) if entries else b""


def _named(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).digest()


def _checkout(start: Path) -> Path | None:
    """Return the folder of steadygrad's source that `start` is in, or None."""
    for folder in (start, *start.parents):
        if 'name = "steadygrad"' in _read(str(folder / "pyproject.toml")):
            return folder if (folder / "csrc").is_dir() else None
    return None


def _package_revision() -> str:
    """Return the commit that the installed package was built from, where it says so."""
    if revision := sg._kernels.build_info().get("revision"):
        return str(revision)
    try:
        text = metadata.distribution("steadygrad").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return UNKNOWN
    return str(json.loads(text or "{}").get("vcs_info", {}).get("commit_id", UNKNOWN))


def this_source(start: Path | None = None) -> Source:
    """Describe the source around `start`, by default the working directory."""
    root = _checkout((start or Path.cwd()).resolve())
    if root is None:
        built_from = str(sg._kernels.build_info().get("csrc_tree") or UNKNOWN)
        return Source(_package_revision(), built_from, UNKNOWN)
    files = tree_name(root / "csrc")
    # A checkout inside somebody else's repository has no history of its own.
    top = git(root, "rev-parse", "--show-toplevel")
    revision = git(root, "rev-parse", "HEAD") if top and Path(top).resolve() == root else None
    if revision is None:
        return Source(os.environ.get(REVISION_VARIABLE) or _package_revision(), files, UNKNOWN)
    dirty = "-dirty" if git(root, "status", "--porcelain") else ""
    committed = git(root, "rev-parse", "HEAD:csrc") == files
    return Source(revision + dirty, files, "committed" if committed else "uncommitted changes")


if __name__ == "__main__":
    machine = this_machine(None if cuda_problem() else this_gpu())
    Path(sys.argv[1]).write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")
