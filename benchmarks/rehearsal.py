"""The benchmark for a GPU on a machine without one: tiny tensors, emulated kernels, host clocks.

It shows that every kind of case runs and that the result file can be written, and nothing about speed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.case import Case
from benchmarks.cases import CUDA_CASES
from benchmarks.device import CudaDevice
from benchmarks.environment import Gpu
from benchmarks.measure import CopyYardstick, Effort, GpuYardstick
from benchmarks.run import measure_all, show
from steadygrad import _kernels
from study.console import open_console


class HostEvents:
    """Time stamps of the host in the place of a device's."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds_between(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        pass

    def keep_busy(self, seconds: float) -> None:
        pass


class EmulatedDevice(CudaDevice):
    """A CUDA device whose kernels run on the CPU; every case is cut down to a few elements."""

    rehearsal = True

    def __init__(self) -> None:
        gpu = Gpu(
            name="emulated",
            architecture="none",
            multiprocessors=0,
            memory_bytes=0,
            l2_bytes=2**13,
            driver="none",
            torch_cuda="none",
            kernels_runtime="none",
            nvcc=environment.nvcc_version(),
        )
        self._prepare(environment.this_machine(gpu), torch.device("cpu"), HostEvents())

    def cases(self) -> Sequence[Case]:
        cut = [case.cut() for case in CUDA_CASES]
        return list({case.key: case for case in cut}.values())

    def effort(self, quick: bool) -> Effort:
        return Effort(seconds=0.0, min_rounds=1, max_rounds=1)

    def free_bytes(self) -> int:
        return environment.available_memory_bytes()

    def yardstick(self) -> CopyYardstick:
        return GpuYardstick(self.ground.device, elements=2**14)

    def release(self) -> None:
        pass


def emulate() -> None:
    """Put the emulated kernels in the place of the compiled ones, for this process."""
    emulated = import_module("steadygrad_emulated")
    for name in dir(_kernels):
        if not name.startswith("__"):
            setattr(_kernels, name, getattr(emulated, name))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file for the numbers")
    options = parser.parse_args(argv)
    if options.out.resolve().parent == (Path(__file__).parent / "results").resolve():
        parser.error("--out: a rehearsal has no place among the results")
    emulate()
    console = open_console()
    found = measure_all(console, EmulatedDevice(), quick=False)
    show(console, found, options.out)
    return 0 if found.results and not found.skipped else 1


if __name__ == "__main__":
    sys.exit(main())
