"""What a measurement depends on: machine, versions, source, caches and free memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import steadygrad as sg
from benchmarks.source import UNKNOWN, this_source

# Assumed where the system does not say: larger than most, so buffers rather rotate once too often.
_DEFAULT_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Gpu:
    """The GPU of one run, and the CUDA versions around it.

    `kernels_runtime` is the CUDA version that steadygrad's kernels were compiled with, `torch_cuda`
    the one of torch's.
    """

    name: str
    architecture: str
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    driver: str
    torch_cuda: str
    kernels_runtime: str
    nvcc: str


@dataclass(frozen=True)
class Environment:
    """Machine and software of one run.

    `device` is "cpu" or "cuda", and `gpu` is None on the former. `cache_bytes` is the size of the
    last-level cache in front of the memory that is measured. `load` is the one-minute load average
    when the run began. `revision`, `csrc_tree` and `csrc_state` are as in `source.Source`.
    """

    device: str
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
    revision: str
    csrc_tree: str
    csrc_state: str
    gpu: Gpu | None = None


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


def cuda_info() -> dict[str, Any]:
    """What the extension says about CUDA; empty where it was built without."""
    found: Any = sg._kernels.build_info().get("cuda", {})
    return dict(found) if found.get("compiled") else {}


def cuda_version(number: int) -> str:
    """13000 as "13.0"; "none" for 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _printed(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def nvcc_version() -> str:
    """The version of the nvcc that a build would find, such as "13.0.88"."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for program in ("nvcc", f"{home}/bin/nvcc"):
        if match := re.search(r"\bV(\d[\d.]*)", _printed(program, "--version")):
            return match.group(1)
    return UNKNOWN


def this_gpu() -> Gpu:
    """Describe the current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    info = cuda_info()
    drivers = _printed("nvidia-smi", *query).split()
    return Gpu(
        name=properties.name,
        architecture=f"sm_{properties.major}{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=drivers[0] if drivers else f"CUDA {cuda_version(info.get('driver_version', 0))}",
        torch_cuda=str(torch.version.cuda),
        kernels_runtime=cuda_version(info.get("runtime_version", 0)),
        nvcc=nvcc_version(),
    )


def this_machine(gpu: Gpu | None = None) -> Environment:
    """Describe this machine and process, and the GPU if the run is on one."""
    source = this_source()
    return Environment(
        device="cpu" if gpu is None else "cuda",
        machine=platform.platform(),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        cache_bytes=cache_bytes() if gpu is None else gpu.l2_bytes,
        memory_bytes=memory_bytes(),
        load=load(),
        python=platform.python_version(),
        torch=torch.__version__,
        steadygrad=sg.__version__,
        revision=source.revision,
        csrc_tree=source.csrc_tree,
        csrc_state=source.csrc_state,
        gpu=gpu,
    )
