"""What is installed, whether it works, and what to do about anything that does not.

Reads everything it can without the extension, so that it has something to say when
``import steadygrad`` fails: then run this file by its path.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from steadygrad.self_check import Check

REINSTALL = "reinstall it; in a clone: pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Fact:
    """A line of a table. ``remedy`` is empty unless the value is wrong."""

    name: str
    value: str
    remedy: str = ""


def run(console: Console) -> int:
    """Print what is installed and how every kernel does; return 0 if all is well, else 1."""
    torch, torch_error = _import("torch")
    package, package_error = _import("steadygrad")
    kernels, kernels_error = _import("steadygrad._kernels")

    facts = version_facts(torch, torch_error)
    _print_facts(console, "Versions", facts)
    boundary = dlpack_facts(torch, kernels)
    if package is None or kernels is None:
        boundary.insert(0, Fact("import", package_error or kernels_error, REINSTALL))
    else:
        boundary = extension_facts(package, kernels) + cuda_facts(torch, kernels) + boundary
    _print_facts(console, "Extension", boundary)
    problems = [f"{fact.name}: {fact.remedy}" for fact in facts + boundary if fact.remedy]

    if package is None or kernels is None:
        console.print("The kernels were not checked: steadygrad cannot be imported.")
    else:
        check_kernels = import_module("steadygrad.self_check").check_kernels
        passed, total, failures = 0, 0, []
        for device in usable_devices(torch, kernels):
            checks = check_kernels(package, device)
            console.print(_check_table(checks, device), "")
            failures += _failures(checks, device)
            passed += sum(check.passed for check in checks)
            total += len(checks)
        problems += failures
        if failures:
            problems.append(f"wrong results: {REINSTALL}; if they stay, report this output")
        console.print(f"{passed} of {total} kernel checks passed.")

    if not problems:
        console.print("[green]All is well.[/]")
        return 0
    console.print("[red]What is wrong and what to do:[/]")
    for problem in problems:
        console.print(f"- {escape(problem)}", soft_wrap=True)
    return 1


def version_facts(torch: ModuleType | None, torch_error: str) -> list[Fact]:
    """Return the versions in use; torch's must be 2.10 or later."""
    remedy = "" if torch else "install torch 2.10 or later: pip install 'torch>=2.10'"
    return [
        Fact("steadygrad", _version("steadygrad")),
        Fact("Python", f"{platform.python_version()}  {sys.executable}"),
        Fact("torch", torch.__version__ if torch else torch_error, remedy),
        Fact("numpy", np.__version__),
        Fact("platform", platform.platform()),
        Fact("CPU", f"{_cpu_name()}, {os.cpu_count()} logical cores"),
    ]


def extension_facts(package: ModuleType, kernels: ModuleType) -> list[Fact]:
    """Return what the extension says about itself, and whether it shares torch's OpenMP."""
    info = kernels.build_info()
    version = str(info["version"])
    mine, theirs = str(info["openmp_library"]), torch_openmp()
    shared = os.path.realpath(mine) == theirs if mine and theirs else None
    relation = {
        True: "the copy torch uses",
        False: f"torch uses {theirs}",
        None: "torch's: unknown",
    }
    remedy = ""
    if not mine and sys.platform == "linux":
        remedy = "no OpenMP was found, so one thread is used: install torch from its own wheel"
    elif shared is False:
        remedy = "torch.set_num_threads does not rule: unset LD_PRELOAD, or reinstall torch"
    return [
        Fact("file", str(kernels.__file__)),
        Fact("version", version, "" if version == _version("steadygrad") else REINSTALL),
        Fact("compiler", str(info["compiler"])),
        _cpu_fact(package),
        Fact("instruction set", str(info["instruction_set"])),
        Fact("OpenMP", f"{mine or 'none'}  ({relation[shared]})", remedy),
        Fact("threads", str(info["max_threads"])),
    ]


def cuda_facts(torch: ModuleType | None, kernels: ModuleType) -> list[Fact]:
    """Return what the extension and torch say about CUDA. A machine without a GPU is in order."""
    info = kernels.build_info().get("cuda", {})
    seen = torch is not None and torch.cuda.is_available()
    if not info.get("compiled"):
        remedy = f"install the CUDA toolkit, so that nvcc is found, and {REINSTALL}" if seen else ""
        unused = ", though torch sees a GPU" if seen else ""
        return [Fact("backend", f"cuda: not compiled{unused}", remedy)]
    toolkit, driver = (_cuda_version(info[key]) for key in ("runtime_version", "driver_version"))
    compiled = f"cuda: compiled with CUDA {toolkit} for {_architectures(info['architectures'])}"
    if not info["driver_version"]:
        without = "no NVIDIA driver, so only the CPU is used"
        return [Fact("backend", compiled), Fact("CUDA driver", without)]
    hidden = "cudaErrorNoDevice" in info["problem"]  # the driver shows none, perhaps as told
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
    if any(device["usable"] for device in info["devices"]) and torch is not None and not seen:
        value = f"torch {torch.__version__} sees no GPU"
        remedy = "install torch's build for CUDA; unset CUDA_VISIBLE_DEVICES if it is empty"
        facts.append(Fact("CUDA in torch", value, remedy))
    return facts


def usable_devices(torch: ModuleType | None, kernels: ModuleType) -> list[str]:
    """Return the devices to check kernels on: "cpu", and "cuda" where its first one is usable."""
    devices = kernels.build_info().get("cuda", {}).get("devices", [])
    seen = torch is not None and torch.cuda.is_available()
    return ["cpu", *(["cuda"] if seen and devices and devices[0]["usable"] else [])]


def _architectures(text: str) -> str:
    """Each as sm_NN, whether they came as "80;90" or as "sm_80, sm_90"."""
    return ", ".join(f"sm_{number}" for number in re.findall(r"\d+\w?", text)) or "no architecture"


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def dlpack_facts(torch: ModuleType | None, kernels: ModuleType | None) -> list[Fact]:
    """Return the DLPack version of torch's exchange API and whether the extension can use it."""
    if torch is None:
        return []
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        value = f"torch {torch.__version__} has none"
        remedy = "it came with torch 2.10: pip install --upgrade 'torch>=2.10'"
        return [Fact("DLPack exchange API", value, remedy)]
    found = exchange_api_version(capsule)
    value = f"{found[0]}.{found[1]} on torch.Tensor"
    if kernels is None:
        return [Fact("DLPack exchange API", value)]
    built = kernels.build_info()["dlpack_version"]
    compatible = found[0] == built[0]
    value += f", {built[0]}.{built[1]} compiled in: {'' if compatible else 'not '}compatible"
    remedy = "" if compatible else "install a steadygrad made for this torch, or an older torch"
    return [Fact("DLPack exchange API", value, remedy)]


def exchange_api_version(capsule: object) -> tuple[int, int]:
    """Return major and minor version: the first two fields of the struct in the capsule."""
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
    """Return the path of the OpenMP copy that torch calls, or "" where that cannot be told."""
    lib = Path(str(import_module("torch").__file__)).parent / "lib"
    # As the dynamic linker resolves it: first among what is loaded globally, then torch's own.
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


def _print_facts(console: Console, title: str, facts: Sequence[Fact]) -> None:
    """A line each, which only the terminal breaks: paths stay whole where they are copied or piped."""
    console.print(f"[italic]{title}[/]")
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        value = escape(fact.value)
        value = f"[red]{value}[/]" if fact.remedy else value
        console.print(f"[bold]{fact.name:<{width}}[/]  {value}", soft_wrap=True, highlight=False)
    console.print()


def _check_table(checks: Sequence[Check], device: str) -> Table:
    """One row an operation, one column a dtype; tolerances stand above the rows they are for."""
    table = Table(
        title=f"Kernels on {device}: error against definition, time for four dtypes",
        title_justify="left",
        box=None,
    )
    table.add_column("operation", no_wrap=True)
    for dtype in dict.fromkeys(check.dtype for check in checks):
        table.add_column(dtype, no_wrap=True)
    table.add_column("ms", justify="right")
    rows: dict[str, list[Check]] = {}
    for check in checks:
        rows.setdefault(check.operation, []).append(check)
    tolerances: list[float] = []
    for operation, row in rows.items():
        if tolerances != (tolerances := [check.tolerance for check in row]):
            table.add_row("tolerance", *(f"   {limit:.0e}" for limit in tolerances), style="dim")
        milliseconds = 1e3 * sum(check.seconds for check in row)
        table.add_row(operation, *map(_cell, row), f"{milliseconds:.2f}")
    return table


def _cell(check: Check) -> str:
    if check.passed:
        return f"[green]ok[/] {check.error:.0e}"
    return "[red]FAIL[/]" if check.message else f"[red]FAIL[/] {check.error:.0e}"


def _failures(checks: Sequence[Check], device: str) -> list[str]:
    """One line for each way in which an operation failed, with the dtypes that it failed in."""
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
    except Exception as error:  # a backend that cannot run says why
        usable, problem = False, str(error)
    if usable:
        return Fact("backend", "cpu: compiled, usable")
    return Fact("backend", f"cpu: compiled, not usable: {problem}", REINSTALL)


def _import(name: str) -> tuple[ModuleType | None, str]:
    """Import a module; return it, or None and why it could not be had."""
    try:
        return import_module(name), ""
    except Exception as error:  # a broken install raises more than ImportError
        return None, str(error) or type(error).__name__


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    raise SystemExit(run(Console()))
