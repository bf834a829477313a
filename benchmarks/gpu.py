"""Build, tests, sanitizers and benchmarks on a machine with a GPU, in under nine minutes.

    make gpu                    # or: python -m benchmarks.gpu
    make gpu ARGS=--rehearse    # the same without a GPU, on emulated kernels
    make gpu ARGS=--dry         # only says what would run

Nothing is fetched: the Python that runs this needs torch, numpy, pybind11, scikit-build-core,
ninja, cmake, pytest, pytest-benchmark and hypothesis. Every stage runs, also after one that failed,
and ends on a schedule; time that one leaves over goes to those behind it. Where the source came
without its history, STEADYGRAD_REVISION names the commit for the result file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.result_files import RESULTS, file_name

ROOT = Path(__file__).resolve().parent.parent
BUILD_MODULES = ("pybind11", "scikit_build_core")
BUILD_TOOLS = ("cmake", "ninja")
# Patterns of the test files that cannot do without packages that the rest can do without.
TESTS_THAT_NEED = {
    "mlxtend": ("tests/study/test_*.py",),
    "rich": ("tests/benchmarks/test_*.py", "tests/study/test_*.py"),
}
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


@dataclass(frozen=True)
class Stage:
    """One command of the run.

    Attributes:
        name: what the summary calls it.
        command: program and arguments.
        limit: seconds on the schedule.
        log: file in the output folder that its output is added to.
        modules: Python modules without which it cannot run.
        tools: programs without which it cannot run.
        optional: whether it is left out where something is missing, and that is no failure.
        environment: variables on top of this process's.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    log: str
    modules: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    optional: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "ok", or why not."""

    stage: Stage
    verdict: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.verdict != "ok" and not self.verdict.startswith("left out")


def _install(python: str, build: str, limit: float, *, rehearse: bool = False) -> Stage:
    options: tuple[str, ...] = ()
    if rehearse:
        # One architecture: without a GPU, all of a release would be compiled.
        options = ("-C", "cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real")
        options += ("-C", "cmake.define.STEADYGRAD_EMULATION=ON")
    return Stage(
        "build",
        (
            *(python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"),
            *("-C", f"build-dir={ROOT / 'build' / build}", *options, "."),
        ),
        limit,
        "build.log",
        ("pip", *BUILD_MODULES),
        BUILD_TOOLS,
        optional=rehearse,
    )


def _doctor(python: str) -> Stage:
    command = (python, "-m", "steadygrad", "doctor")
    return Stage("doctor", command, 20, "build.log", ("numpy", "torch"), optional=True)


def _tests(python: str, name: str, which: str, limit: float) -> Stage:
    options = ("-q", "--maxfail=25", "--durations=5", "-p", "no:cacheprovider")
    without = tuple(f"--ignore={path}" for path in untestable())
    command = (python, "-m", "pytest", *options, *without, "-m", which)
    return Stage(name, command, limit, "tests.log", ("torch", "pytest", "hypothesis"))


def untestable() -> list[str]:
    """Test files that are left out for want of a package."""
    lacking = (name for name in TESTS_THAT_NEED if importlib.util.find_spec(name) is None)
    return sorted({path for name in lacking for path in _test_files(name)})


def _test_files(package: str) -> list[str]:
    """Those that need the package; a pattern that no file fits any more is an error, as its tests would run."""
    paths: list[str] = []
    for pattern in TESTS_THAT_NEED[package]:
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)]
        if not found:
            raise FileNotFoundError(f"TESTS_THAT_NEED[{package!r}]: no file fits {pattern}")
        paths += found
    return paths


def _sanitizer(python: str, tool: str, *dtypes: str) -> Stage:
    command = (
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"),
        # torch asks the driver for functions that it may not have; that is not our error.
        *("--report-api-errors", "no"),
        *(python, "-m", "benchmarks.sanitized_steps", "--dtypes", *dtypes),
    )
    return Stage(
        tool, command, 35, "sanitizers.log", ("torch",), ("compute-sanitizer",),
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip


def plan(python: str, out: Path) -> list[Stage]:
    """What runs on a machine with a GPU; what matters least comes last."""
    metrics = ("--metrics", ",".join(METRICS), "--clock-control", "none", "--csv", "--page", "raw")
    kernels = (
        "--profile-from-start",
        "off",
        "--kernel-name",
        "regex:grad_norm_kernel|update_kernel|batch_norm",
    )
    return [
        _install(python, "gpu", 120),
        _doctor(python),
        _tests(python, "tests on the GPU", "gpu", 100),
        _sanitizer(python, "memcheck", "float32", "float64", "bfloat16", "float16"),
        _sanitizer(python, "racecheck", "float32", "bfloat16"),
        _sanitizer(python, "initcheck", "float32", "bfloat16"),
        Stage(
            "benchmark",
            (
                *(python, "-m", "benchmarks", "--device", "cuda", "--limit", "95"),
                *("--out", str(out / "benchmark.json")),
            ),
            125,
            "benchmark.log",
            ("torch",),
        ),
        Stage(
            "profile",
            (
                *("ncu", *metrics, *kernels, "--log-file", str(out / "ncu.csv")),
                *(python, "-m", "benchmarks.profiled_step"),
            ),
            30,
            "benchmark.log",
            ("torch",),
            ("ncu",),
            optional=True,
        ),
        _tests(python, "other tests", "not gpu", 35),
    ]


def rehearsal(python: str, out: Path) -> list[Stage]:
    """The same without a GPU. Where build tools are missing, what is installed is used."""
    return [
        _install(python, "rehearsal", 480, rehearse=True),
        _doctor(python),
        _tests(python, "tests", "emulated", 400),
        Stage(
            "each operation once",
            (python, "-m", "benchmarks.sanitized_steps", "--emulate"),
            60,
            "sanitizers.log",
            ("torch", "steadygrad_emulated"),
        ),
        Stage(
            "benchmark",
            (python, "-m", "benchmarks.rehearsal", "--out", str(out / "rehearsal.json")),
            120,
            "benchmark.log",
            ("torch", "steadygrad_emulated"),
        ),
    ]


def extend_path() -> None:
    """Let programs be found beside this Python and in the CUDA toolkit."""
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    beside = Path(sys.executable).parent
    os.environ["PATH"] = os.pathsep.join([str(beside), os.environ["PATH"], f"{cuda}/bin"])


def missing(stage: Stage) -> list[str]:
    """The modules and tools that a stage needs and this machine lacks."""
    modules = [name for name in stage.modules if importlib.util.find_spec(name) is None]
    return modules + [name for name in stage.tools if shutil.which(name) is None]


def run_stage(stage: Stage, out: Path, seconds: float) -> Outcome:
    """Run one stage for at most `seconds`; its whole process group ends with it."""
    importlib.invalidate_caches()  # an earlier stage may have installed what this one needs
    if lacks := missing(stage):
        reason = f"{', '.join(lacks)} not found"
        return Outcome(stage, f"left out: {reason}" if stage.optional else reason, 0.0)
    start = time.monotonic()
    environment = {**os.environ, "COLUMNS": "140", "PIP_NO_INDEX": "1", **stage.environment}
    # pip refuses constraints for a build that has no environment of its own.
    environment.pop("PIP_BUILD_CONSTRAINT", None)
    with (out / stage.log).open("a", encoding="utf-8") as log:
        log.write(f"\n== {stage.name}: {' '.join(stage.command)}\n")
        log.flush()
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(seconds, 1.0))
            verdict = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            verdict = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(stage, verdict, time.monotonic() - start)


def run_all(
    stages: Iterable[Stage],
    out: Path,
    say: Callable[[str], None],
    runner: Callable[[Stage, Path, float], Outcome] = run_stage,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the stages in turn, each until its end on the schedule."""
    start, end = clock(), 0.0
    outcomes = []
    for stage in stages:
        end += stage.limit
        say(f"{stage.name} ...")
        outcome = runner(stage, out, start + end - clock())
        say(f"{stage.name}: {outcome.verdict}, {outcome.seconds:.1f} s")
        if outcome.failed and (out / stage.log).exists():
            lines = (out / stage.log).read_text(encoding="utf-8", errors="replace").splitlines()
            say("\n".join(f"    {line}" for line in lines[-25:]))
        outcomes.append(outcome)
    return outcomes


def keep_result(out: Path, results: Path = RESULTS) -> Path | None:
    """Copy the benchmark's numbers to the results; None if there are none, or not of a GPU."""
    try:
        result = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if result["rehearsal"] or result["environment"]["gpu"] is None:
        return None
    results.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(out / "benchmark.json", results / file_name(result)))


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line a stage, and one for all."""
    width = max(len(outcome.stage.name) for outcome in outcomes)
    lines = [f"{o.stage.name:<{width}}  {o.seconds:6.1f} s  {o.verdict}" for o in outcomes]
    failed = sum(outcome.failed for outcome in outcomes)
    total = sum(outcome.seconds for outcome in outcomes)
    lines.append(f"{failed} of {len(outcomes)} stages failed, {total:.0f} s in all")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="emulated kernels, without a GPU")
    parser.add_argument("--dry", action="store_true", help="only say what would run")
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="folder (default: out/gpu)"
    )
    options = parser.parse_args(argv)
    extend_path()
    out = options.out.resolve()
    stages = (rehearsal if options.rehearse else plan)(sys.executable, out)

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    for path in untestable():
        say(f"{path} is left out: a package that it needs is missing")
    if options.dry:
        for stage in stages:
            lacks = f"  (not found: {', '.join(missing(stage))})" if missing(stage) else ""
            say(f"{stage.name}, {stage.limit:.0f} s{lacks}\n    {' '.join(stage.command)}")
        say(f"{sum(stage.limit for stage in stages):.0f} s at most")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for name in (*{stage.log for stage in stages}, "benchmark.json", "ncu.csv", "rehearsal.json"):
        (out / name).unlink(missing_ok=True)
    outcomes = run_all(stages, out, say)
    text = summary(outcomes)
    if options.rehearse:
        text = f"Rehearsal: no GPU was used.\n{text}"
    elif kept := keep_result(out):
        text += f"\nNumbers written to {kept.relative_to(ROOT)}; make performance renews the page"
    (out / "summary.txt").write_text(f"{text}\n", encoding="utf-8")
    say(f"\n{text}\nLogs are in {options.out}")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
