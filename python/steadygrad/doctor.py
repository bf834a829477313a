"""``python -m steadygrad``: what is installed, whether it works, and what to do about anything that does not.

Without torch the doctor prints the message of ``import steadygrad``; without the extension it says what runs instead.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from steadygrad.prerequisites import REINSTALL, find_problem

if TYPE_CHECKING:
    from steadygrad.self_check import Check


@dataclass(frozen=True)
class Fact:
    """A line of a table. ``remedy`` is empty unless the value is wrong."""

    name: str
    value: str
    remedy: str = ""


class _CannotPrint(Exception):
    """Raised if standard output cannot be written to, for instance because the disk is full."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the doctor from the command line.

    Args:
        argv: Arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0 if all is well, 1 if something is wrong, 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 if the arguments are not understood, with 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="steadygrad",
        description="Show what is installed, check every kernel against its definition in NumPy, "
        "and say what to do about anything that is wrong. Exits with 1 if something is.",
    )
    version = f"steadygrad {installed_version('steadygrad')}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "command", nargs="?", choices=["doctor"], help="the only command, and may be left out"
    )
    parser.parse_args(argv)
    try:
        return run()
    except BrokenPipeError:  # A reader such as head has closed the pipe.
        drop_output()
        return 1
    except _CannotPrint as error:
        drop_output()
        sys.stderr.write(f"doctor: standard output cannot be written: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130


def drop_output() -> None:
    """Discards what is still buffered for standard output: Python would fail again when it flushes that at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _print(line: str) -> None:
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _CannotPrint(error.strerror) from error


def run() -> int:
    """Prints what is installed and how every kernel does; returns 0 if all is well, else 1."""
    _print_facts("Versions", version_facts())
    if problem := find_problem():
        _print("The kernels were not checked: steadygrad cannot be imported.")
        return _conclude([problem])

    package, kernels, torch = map(import_module, ("steadygrad", "steadygrad._kernels", "torch"))
    if kernels.__name__ == "steadygrad.without_kernels":
        facts = composite_facts(kernels.reason)
        _print_facts("Extension", facts)
        _print("There are no kernels to check.")
        return _conclude([f"{fact.name}: {fact.remedy}" for fact in facts if fact.remedy])
    facts = extension_facts(package, kernels)
    facts += cuda_facts(torch, kernels) + dlpack_facts(torch, kernels)
    _print_facts("Extension", facts)
    problems = [f"{fact.name}: {fact.remedy}" for fact in facts if fact.remedy]

    check_kernels = import_module("steadygrad.self_check").check_kernels
    passed, total, failures = 0, 0, []
    for device in usable_devices(torch, kernels):
        checks = check_kernels(package, device)
        _print_checks(checks, device)
        failures += _failures(checks, device)
        passed += sum(check.passed for check in checks)
        total += len(checks)
    problems += failures
    if failures:
        problems.append(f"wrong results: {REINSTALL}; if they stay, report this output")
    _print(f"{passed} of {total} kernel checks passed.")
    return _conclude(problems)


def _conclude(problems: Sequence[str]) -> int:
    if not problems:
        _print("All is well.")
        return 0
    _print("What is wrong and what to do:")
    for problem in problems:
        _print(f"- {problem}")
    return 1


def version_facts() -> list[Fact]:
    """Returns the versions of what is installed, and the machine that it is on."""
    return [
        Fact("steadygrad", installed_version("steadygrad")),
        Fact("Python", f"{platform.python_version()}  {sys.executable}"),
        Fact("torch", _imported_version("torch")),
        Fact("numpy", _imported_version("numpy")),
        Fact("platform", platform.platform()),
        Fact("CPU", f"{cpu_name()}, {os.cpu_count()} logical cores"),
    ]


def extension_facts(package: ModuleType, kernels: ModuleType) -> list[Fact]:
    """Returns what the extension says about itself, and whether it shares torch's OpenMP."""
    info = kernels.build_info()
    version = str(info["version"])
    mine, theirs = str(info["openmp_library"]), torch_openmp()
    shared = os.path.realpath(mine) == theirs if mine and theirs else None
    relation = {
        True: "the copy torch uses",
        False: f"torch uses {theirs}",
        None: "torch's: unknown",
    }
    current = version == installed_version("steadygrad")
    remedy = ""
    if not mine and sys.platform == "linux":
        remedy = "no OpenMP was found, so one thread is used: install torch from its own wheel"
    elif shared is False:
        remedy = "torch.set_num_threads does not rule: unset LD_PRELOAD, or reinstall torch"
    return [
        Fact("file", str(kernels.__file__)),
        Fact("version", version, "" if current else REINSTALL),
        Fact("compiler", str(info["compiler"])),
        _cpu_fact(package),
        Fact("instruction set", str(info["instruction_set"])),
        Fact("OpenMP", f"{mine or 'none'}  ({relation[shared]})", remedy),
        Fact("threads", str(info["max_threads"])),
    ]


GET_KERNELS = "with a C++17 compiler, in a clone: pip install --force-reinstall --no-deps ."


def composite_facts(reason: str) -> list[Fact]:
    """Returns what runs without the extension, and how to get it.

    Args:
        reason: Why there is none. An extension that exists but cannot be loaded is a fault.
    """
    return [
        Fact("file", f"none: {reason}", REINSTALL if reason.startswith("it cannot") else ""),
        Fact("functions", "torch's operations, on every device that torch has"),
        Fact("Stabilizer, optim", "in place: torch's operations, then the optimizer's own step"),
        Fact("batch norm", "torch's"),
        Fact("to get kernels", GET_KERNELS),
    ]


def cuda_facts(torch: ModuleType, kernels: ModuleType) -> list[Fact]:
    """Returns what the extension and torch say about CUDA. A machine without a GPU is in order."""
    info = kernels.build_info().get("cuda", {})
    seen = torch.cuda.is_available()
    if not info.get("compiled"):
        remedy = f"install the CUDA toolkit, so that nvcc is found, and {REINSTALL}" if seen else ""
        unused = ", though torch sees a GPU" if seen else ""
        return [Fact("backend", f"cuda: not compiled{unused}", remedy)]
    toolkit, driver = (cuda_version(info[key]) for key in ("runtime_version", "driver_version"))
    compiled = (
        f"cuda: compiled with CUDA {toolkit} for {info['architectures'] or 'no architecture'}"
    )
    if not info["driver_version"]:
        without = "no NVIDIA driver, so only the CPU is used"
        return [Fact("backend", compiled), Fact("CUDA driver", without)]
    hidden = "cudaErrorNoDevice" in info["problem"]  # CUDA_VISIBLE_DEVICES may hide all devices.
    facts = [
        Fact("backend", compiled),
        Fact("CUDA driver", f"for CUDA {driver}", "" if hidden else info["problem"]),
    ]
    if hidden or not (info["devices"] or info["problem"]):
        facts.append(Fact("CUDA devices", "none, so only the CPU is used"))
    for number, device in enumerate(info["devices"]):
        architecture = f"{device['major']}{device['minor']}"
        remedy = ""
        if not device["usable"]:
            remedy = f"build for it: CUDAARCHS={architecture} pip install --no-deps ."
        value = f"{device['name']}, sm_{architecture}: {'not ' * bool(remedy)}usable"
        facts.append(Fact(f"CUDA device {number}", value, remedy))
    if any(device["usable"] for device in info["devices"]) and not seen:
        value = f"torch {torch.__version__} sees no GPU"
        remedy = "install torch's build for CUDA; unset CUDA_VISIBLE_DEVICES if it is empty"
        facts.append(Fact("CUDA in torch", value, remedy))
    return facts


def usable_devices(torch: ModuleType, kernels: ModuleType) -> list[str]:
    """Returns the devices to check kernels on: "cpu", and "cuda" if its first device is usable."""
    devices = kernels.build_info().get("cuda", {}).get("devices", [])
    seen = torch.cuda.is_available()
    return ["cpu", *(["cuda"] if seen and devices and devices[0]["usable"] else [])]


def cuda_version(number: int) -> str:
    """Returns CUDA's version as people write it: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def dlpack_facts(torch: ModuleType, kernels: ModuleType) -> list[Fact]:
    """Returns the DLPack version of torch's exchange API and whether the extension can use it."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        value = f"torch {torch.__version__} has none"
        remedy = "it came with torch 2.10: pip install --upgrade 'torch>=2.10'"
        return [Fact("DLPack exchange API", value, remedy)]
    found = exchange_api_version(capsule)
    built = kernels.build_info()["dlpack_version"]
    compatible = found[0] == built[0]
    value = f"{found[0]}.{found[1]} on torch.Tensor, {built[0]}.{built[1]} compiled in: "
    value += "compatible" if compatible else "not compatible"
    remedy = "" if compatible else "install a steadygrad made for this torch, or an older torch"
    return [Fact("DLPack exchange API", value, remedy)]


def exchange_api_version(capsule: object) -> tuple[int, int]:
    """Returns major and minor version: the first two fields of the struct in the capsule."""
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    get_pointer = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))
    major, minor = (ctypes.c_uint32 * 2).from_address(get_pointer(capsule, b"dlpack_exchange_api"))
    return major, minor


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def torch_openmp() -> str:
    """Returns the path of the OpenMP copy that torch calls, or "" if it cannot be found out."""
    lib = Path(str(import_module("torch").__file__)).parent / "lib"
    # The dynamic linker looks among the libraries that are loaded globally, and then among torch's own.
    for name in (None, *map(str, sorted(lib.glob("libtorch_cpu.*")))):
        try:
            library = ctypes.CDLL(name)
            info = _SymbolInfo()
            ctypes.CDLL(None).dladdr(library.omp_get_max_threads, ctypes.byref(info))
        except (AttributeError, OSError, TypeError):
            continue
        if info.file:
            return str(os.path.realpath(info.file.decode()))
    return ""


def _print_facts(title: str, facts: Sequence[Fact]) -> None:
    width = max(len(fact.name) for fact in facts)
    _print(title)
    for fact in facts:
        _print(f"  {fact.name:<{width}}  {fact.value}")
    _print("")


def _print_checks(checks: Sequence[Check], device: str) -> None:
    """Prints one row per operation and one column per dtype; tolerances stand above the rows that they are for."""
    dtypes = list(dict.fromkeys(check.dtype for check in checks))
    by_operation: dict[str, list[Check]] = {}
    for check in checks:
        by_operation.setdefault(check.operation, []).append(check)
    rows = [["operation", *dtypes, "ms"]]
    tolerances: list[float] = []
    for operation, row in by_operation.items():
        if tolerances != (tolerances := [check.tolerance for check in row]):
            rows.append(["tolerance", *(f"   {limit:.0e}" for limit in tolerances), ""])
        milliseconds = 1e3 * sum(check.seconds for check in row)
        rows.append([operation, *map(_cell, row), f"{milliseconds:.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    _print(f"Kernels on {device}: error against definition, time for four dtypes")
    for *cells, last in rows:
        left = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False))
        _print(f"  {'  '.join(left)}  {last:>{widths[-1]}}".rstrip())
    _print("")


def _cell(check: Check) -> str:
    if check.passed:
        return f"ok {check.error:.0e}"
    return "FAIL" if check.message else f"FAIL {check.error:.0e}"


def _failures(checks: Sequence[Check], device: str) -> list[str]:
    """Returns one line for each way in which an operation failed, with the dtypes that it failed for."""
    dtypes: dict[str, list[str]] = {}
    where = "" if device == "cpu" else f" on {device}"
    for check in checks:
        if not check.passed:
            reason = check.message or f"error {check.error:.1e} above {check.tolerance:.1e}"
            dtypes.setdefault(f"{check.operation}{where}: {reason}", []).append(check.dtype)
    return [f"{failure} ({', '.join(which)})" for failure, which in dtypes.items()]


def _cpu_fact(package: Any) -> Fact:
    import torch

    try:
        usable = float(package.get_total_norm([torch.ones(4)])) == 2.0
        problem = "gives wrong results"
    except Exception as error:  # The message says why this backend cannot run.
        usable, problem = False, str(error)
    if usable:
        return Fact("backend", "cpu: compiled, usable")
    return Fact("backend", f"cpu: compiled, not usable: {problem}", REINSTALL)


def installed_version(distribution: str) -> str:
    """Returns the version that pip has recorded, or "not installed"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _imported_version(name: str) -> str:
    """Returns the version of the module; the one that pip has recorded if it cannot be imported."""
    try:
        return str(import_module(name).__version__)
    except Exception:  # A broken install raises more than ImportError.
        return installed_version(name)


def cpu_name() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
