"""What a measurement depends on: machine, versions, revision, caches and free memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import steadygrad as sg

# Assumed where the system does not say: larger than most, so buffers rather rotate once too often.
_DEFAULT_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Environment:
    """Machine and software of one run; `revision` is None outside a checkout of steadygrad.

    `load` is the one-minute load average when the run began.
    """

    machine: str
    cpu: str
    cores: int
    threads: int
    cache_bytes: int
    memory_bytes: int
    load: float
    python: str
    torch: str
    steadygrad: str
    revision: str | None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None


def cpu_name() -> str:
    """The processor's marketing name where Linux tells it, else what `platform` knows."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Size of the first core's largest cache in bytes; 64 MiB where the system does not say."""
    units = {"K": 2**10, "M": 2**20}
    sizes = []
    for index in range(8):
        text = _read(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size")
        match = re.fullmatch(r"(\d+)([KM])\s*", text or "")
        if match:
            sizes.append(int(match.group(1)) * units[match.group(2)])
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def memory_bytes() -> int:
    """Physical memory in bytes; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def load() -> float:
    """The system's load average over the last minute; 0 where there is none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def available_memory_bytes() -> int:
    """Memory free to take, within the container's limit; all memory where nothing is known."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _read("/proc/meminfo") or "", re.MULTILINE)
    available = int(match.group(1)) * 1024 if match else memory_bytes()
    limit = (_read("/sys/fs/cgroup/memory.max") or "max").strip()
    used = (_read("/sys/fs/cgroup/memory.current") or "0").strip()
    if limit.isdecimal() and used.isdecimal():
        available = min(available, int(limit) - int(used))
    return available


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()


def git_revision() -> str | None:
    """Commit of the steadygrad checkout that the command runs in; "-dirty" when files differ."""
    try:
        project = Path(_git("rev-parse", "--show-toplevel")) / "pyproject.toml"
        if 'name = "steadygrad"' not in project.read_text(encoding="utf-8"):
            return None
        revision = _git("rev-parse", "HEAD")
        return f"{revision}-dirty" if _git("status", "--porcelain") else revision
    except (OSError, subprocess.SubprocessError):
        return None


def this_machine() -> Environment:
    """Describe this machine and process."""
    return Environment(
        machine=platform.platform(),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        cache_bytes=cache_bytes(),
        memory_bytes=memory_bytes(),
        load=load(),
        python=platform.python_version(),
        torch=torch.__version__,
        steadygrad=sg.__version__,
        revision=git_revision(),
    )
