"""What is installed, whether it works, and what to do about anything that does not.

Reads everything it can without the extension, so that it has something to say when
``import steadygrad`` fails: then run this file by its path.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
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
    import torch

REINSTALL = "reinstall it; in a clone: pip install --force-reinstall --no-deps ."

# Largest |got - want| / max |want|. Norms are fp32 for half types too; elements are rounded to the
# gradient's or parameter's dtype, at most twice.
TOLERANCES = {
    "norm": {"float32": 1.2e-7, "float64": 1e-15, "bfloat16": 1.2e-7, "float16": 1.2e-7},
    "elements": {"float32": 5e-7, "float64": 1e-14, "bfloat16": 8e-3, "float16": 1e-3},
}

# Chunk and vector edges: sizes that no vector width divides, and a 4-d tensor.
SHAPES = ((33, 7), (4099,), (8, 3, 3, 3))
LIMIT, CLIP_VALUE, L1, L2, AMOUNT = 40.0, 0.5, 0.1, 0.2, 0.3

Arrays = Sequence[Any]


@dataclass(frozen=True)
class Fact:
    """A line of a table. ``remedy`` is empty unless the value is wrong."""

    name: str
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """The outcome of one operation in one dtype. ``message`` says how it raised, if it did."""

    operation: str
    dtype: str
    error: float
    tolerance: float
    seconds: float
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def run(console: Console) -> int:
    """Print what is installed and how every kernel does; return 0 if all is well, else 1."""
    torch, torch_error = _import("torch")
    package, package_error = _import("steadygrad")
    kernels, kernels_error = _import("steadygrad._kernels")

    facts = version_facts(torch, torch_error)
    console.print(_fact_table("Versions", facts), "")
    boundary = dlpack_facts(torch, kernels)
    if package is None or kernels is None:
        boundary.insert(0, Fact("import", package_error or kernels_error, REINSTALL))
    else:
        boundary = extension_facts(package, kernels) + boundary
    console.print(_fact_table("Extension", boundary), "")
    problems = [f"{fact.name}: {fact.remedy}" for fact in facts + boundary if fact.remedy]

    if package is None or kernels is None:
        console.print("The kernels were not checked: steadygrad cannot be imported.")
    else:
        checks = check_kernels(package)
        console.print(_check_table(checks), "")
        failures = _failures(checks)
        problems += failures
        if failures:
            problems.append(f"wrong results: {REINSTALL}; if they stay, report this output")
        passed = sum(check.passed for check in checks)
        console.print(f"{passed} of {len(checks)} kernel checks passed.")

    if not problems:
        console.print("[green]All is well.[/]")
        return 0
    console.print("[red]What is wrong and what to do:[/]")
    for problem in problems:
        console.print(f"- {escape(problem)}")
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
        *(_backend_fact(package, name) for name in info["backends"]),
        Fact("instruction set", str(info["instruction_set"])),
        Fact("OpenMP", f"{mine or 'none'}  ({relation[shared]})", remedy),
        Fact("threads", str(info["max_threads"])),
    ]


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


# The self-check: an operation runs on tensors, its definition on the same numbers in float64.


@dataclass(frozen=True)
class _Operation:
    """What ``run`` returns, if it does, and what ``writes`` names is compared with ``define``."""

    name: str
    writes: str
    run: Callable[[Any, list[torch.nn.Parameter]], torch.Tensor | None]
    define: Callable[[Any, Arrays, Arrays], Arrays]


def check_kernels(package: ModuleType) -> list[Check]:
    """Run every operation in every dtype on small random tensors; compare with its definition."""
    reference = import_module("steadygrad.reference")
    return [
        _check(operation, dtype, package, reference)
        for operation in _operations()
        for dtype in TOLERANCES["norm"]
    ]


def _check(operation: _Operation, dtype: str, package: Any, reference: Any) -> Check:
    tolerance = TOLERANCES["elements" if operation.writes else "norm"][dtype]
    params = _random_parameters(dtype)
    want = operation.define(reference, _arrays(params), _arrays(_grads(params)))
    start = time.perf_counter()
    try:
        operation.run(package, _random_parameters(dtype))  # the first call also loads code
        start = time.perf_counter()
        number = operation.run(package, params)
    except Exception as error:  # whatever a broken kernel raises is a finding
        message = f"{type(error).__name__}: {error}"
        return Check(
            operation.name, dtype, math.nan, tolerance, time.perf_counter() - start, message
        )
    seconds = time.perf_counter() - start
    written: dict[str, Sequence[torch.Tensor]] = {"gradients": _grads(params), "parameters": params}
    got = _arrays([*([] if number is None else [number]), *written.get(operation.writes, [])])
    errors = [np.max(np.abs(g - w)) / np.max(np.abs(w)) for g, w in zip(got, want, strict=True)]
    return Check(operation.name, dtype, float(np.max(errors)), tolerance, seconds)


def _operations() -> list[_Operation]:
    return [
        *(_norm(norm_type) for norm_type in (2.0, 1.0, math.inf, 3.0)),
        _Operation(
            "clip_grad_norm_",
            "gradients",
            lambda sg, params: sg.clip_grad_norm_(params, LIMIT),
            lambda ref, params, grads: [ref.norm.total_norm(grads), *_clipped(ref, grads)],
        ),
        _Operation(
            "clip_grads_with_norm_",
            "gradients",
            lambda sg, params: sg.clip_grads_with_norm_(
                params, LIMIT, sg.get_total_norm(_grads(params))
            ),
            lambda ref, params, grads: _clipped(ref, grads),
        ),
        _Operation(
            "clip_grad_value_",
            "gradients",
            lambda sg, params: sg.clip_grad_value_(params, CLIP_VALUE),
            lambda ref, params, grads: ref.clip.clip_grad_value(grads, CLIP_VALUE),
        ),
        _Operation(
            "add_penalty_",
            "gradients",
            lambda sg, params: sg.add_penalty_(params, L1, L2),
            _penalized,
        ),
        _Operation(
            "soft_threshold_",
            "parameters",
            lambda sg, params: sg.soft_threshold_(params, AMOUNT),
            lambda ref, params, grads: [ref.penalty.soft_threshold(p, AMOUNT) for p in params],
        ),
        _steps("SGD", lr=0.05, momentum=0.9, nesterov=True),
        # eps stands well above the roots of squares that a float16 state cannot hold.
        _steps("Adam", lr=0.05, eps=0.1, amsgrad=True),
        _steps("AdamW", lr=0.05, eps=0.1, weight_decay=0.1),
        _steps("Adagrad", lr=0.05, lr_decay=0.1),
        _steps("RMSprop", lr=0.05, momentum=0.9),
    ]


def _norm(norm_type: float) -> _Operation:
    return _Operation(
        f"get_total_norm, {norm_type:g}",
        "",
        lambda sg, params: sg.get_total_norm(_grads(params), norm_type),
        lambda ref, params, grads: [ref.norm.total_norm(grads, norm_type)],
    )


def _clipped(reference: Any, grads: Arrays) -> Arrays:
    return list(reference.clip.clip_grad_norm(grads, LIMIT)[0])


def _penalized(reference: Any, params: Arrays, grads: Arrays) -> Arrays:
    penalty = reference.penalty
    added = [penalty.penalty_gradient(param, L1, L2) for param in params]
    value = penalty.penalty_value(params, L1, L2)
    return [value, *(grad + extra for grad, extra in zip(grads, added, strict=True))]


def _steps(rule: str, **hyper: Any) -> _Operation:
    """Two fused steps, the second on the state of the first, with penalty and clip."""

    def run(sg: Any, params: list[torch.nn.Parameter]) -> None:
        optimizer = getattr(sg.optim, rule)(params, max_norm=LIMIT, l1=L1, l2=L2, **hyper)
        optimizer.step()
        optimizer.step()
        if optimizer.path != "fused":
            raise RuntimeError(f"expected the fused path, got {optimizer.path!r}")

    def define(reference: Any, params: Arrays, grads: Arrays) -> Arrays:
        step = reference.step
        group = step.Group(range(len(params)), hyper, max_norm=LIMIT, l1=L1, l2=L2)
        states: list[dict[str, Any]] = [{} for _ in params]
        for _ in range(2):
            result = step.step(params, grads, states, [group], step.StepOptions(rule))
            params, states = result.params, result.states
        return params

    return _Operation(f"{rule}, 2 fused steps", "parameters", run, define)


def _random_parameters(dtype: str) -> list[torch.nn.Parameter]:
    import torch

    generator = np.random.default_rng(0)
    params = []
    for shape in SHAPES:
        value, grad = torch.from_numpy(generator.standard_normal((2, *shape)))
        params.append(torch.nn.Parameter(value.to(getattr(torch, dtype))))
        params[-1].grad = grad.to(params[-1].dtype)
    return params


def _grads(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [param.grad for param in params if param.grad is not None]


def _arrays(tensors: Sequence[torch.Tensor]) -> Arrays:
    return [tensor.detach().double().numpy().copy() for tensor in tensors]


def _fact_table(title: str, facts: Sequence[Fact]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for fact in facts:
        value = escape(fact.value)
        table.add_row(fact.name, f"[red]{value}[/]" if fact.remedy else value)
    return table


def _check_table(checks: Sequence[Check]) -> Table:
    """One row an operation, one column a dtype; tolerances stand above the rows they are for."""
    table = Table(
        title="Kernels: error against their definition, and time for the four dtypes",
        title_justify="left",
        box=None,
    )
    table.add_column("operation", no_wrap=True)
    for dtype in TOLERANCES["norm"]:
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


def _failures(checks: Sequence[Check]) -> list[str]:
    """One line for each way in which an operation failed, with the dtypes that it failed in."""
    dtypes: dict[str, list[str]] = {}
    for check in checks:
        if not check.passed:
            reason = check.message or f"error {check.error:.1e} above {check.tolerance:.1e}"
            dtypes.setdefault(f"{check.operation}: {reason}", []).append(check.dtype)
    return [f"{failure} ({', '.join(where)})" for failure, where in dtypes.items()]


def _backend_fact(package: Any, name: str) -> Fact:
    import torch

    tensor = torch.ones(4, device=name)
    try:
        usable = float(package.get_total_norm([tensor])) == 2.0
        problem = "gives wrong results"
    except Exception as error:  # a backend that cannot run says why
        usable, problem = False, str(error)
    if usable:
        return Fact("backend", f"{name}: compiled, usable")
    return Fact("backend", f"{name}: compiled, not usable: {problem}", REINSTALL)


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
