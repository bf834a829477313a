"""Build, test and measure on a machine with a GPU, in two calls that can be cut short without loss.

    make gpu-carry                  # before, on a machine without a GPU: a wheel that travels, in build/carry
    make gpu ARGS=correctness       # at most 330 s: doctor, memcheck, tests, racecheck, initcheck
    make gpu ARGS=figures           # at most 240 s: the benchmark, what matters most first, then ncu
    make gpu                        # both, one after the other
    make gpu ARGS=--rehearse        # the same without a GPU, on the emulated kernels of `make test`
    make gpu ARGS=--dry             # only prints what would run

Nothing is downloaded: the Python that runs this needs torch, numpy, pytest, pytest-xdist, hypothesis,
rich, jinja2 and matplotlib, and, if no carried wheel loads, pybind11, scikit-build-core, ninja and
cmake. Every stage runs, even after a stage that failed. A stage is ended on a schedule, by SIGINT and
then by SIGKILL, and time that it leaves over goes to later stages. If the source came without its git
history, STEADYGRAD_REVISION names the commit for the result files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "build" / "carry"
RESULTS = ROOT / "benchmarks" / "results"
# LIMITS holds the time limit of each call in seconds, LOGS the files that it writes.
LIMITS = {"correctness": 330, "figures": 240}
LOGS = {
    "correctness": ("build.log", "machine.json", "sanitizers.log", "tests.log", "correctness.txt"),
    "figures": ("build.log", "benchmark.log", "benchmark.json", "ncu.csv", "figures.txt"),
}
# GPU tests that fit in 120 s on 8 workers: every kernel, dtype and policy, streams, graphs, and
# sync-debug mode.
TESTS = "gpu and not (ranks or compile or integration or slow)"
# Lines of output that match are reported at once, while a stage runs.
FAILURE = re.compile(rb"\bFAILED\b|^WRONG |^ERROR tests|^========= +(Invalid|Uninit|Error:|Race)")
# Seconds between SIGINT, at which pytest and the benchmark report what they have, and SIGKILL.
GRACE = 8.0
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
Say = Callable[[str], object]


@dataclass(frozen=True)
class Stage:
    """Describes one command of a call."""

    name: str  # name in the summary
    command: tuple[str, ...]
    limit: float  # seconds on the schedule
    log: str  # file in the output folder to which its output is appended
    optional: bool = False  # whether the call can succeed without it
    unless: str = ""  # name of the stage whose success makes this one unnecessary
    environment: dict[str, str] = field(default_factory=dict)  # variables added to this process's


@dataclass(frozen=True)
class Outcome:
    """Says how a stage ended: "ok", or why not."""

    stage: Stage
    verdict: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Return whether this outcome makes the call fail."""
        return self.verdict != "ok" and not self.stage.optional and not self.needless

    @property
    def needless(self) -> bool:
        """Return whether another stage has made this one unnecessary."""
        return self.verdict.startswith("not needed")


def _installs(python: str, limit: float) -> list[Stage]:
    """Return the stages that install the carried wheel or, if it does not load, build one."""
    install = (python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall")
    loads = "import steadygrad as s; assert s._kernels.build_info()['cuda']['compiled']"
    stages = []
    for wheel in sorted(CARRIED.glob("steadygrad-*.whl"))[-1:]:
        both = (shlex.join((*install, str(wheel))), shlex.join((python, "-c", loads)))
        command = ("sh", "-c", " && ".join(both))
        stages.append(Stage("carried wheel", command, 15, "build.log", optional=True))
        limit -= 15
    folder, cuda = f"build-dir={ROOT / 'build' / 'gpu'}", "cmake.define.STEADYGRAD_CUDA=REQUIRED"
    build = (*install, "--no-build-isolation", "-C", folder, "-C", cuda, ".")
    return [*stages, Stage("build", build, limit, "build.log", unless="carried wheel")]


def _tests(python: str, which: str, limit: float, workers: int, *folders: str) -> Stage:
    # pytest prints a line per finished test, and failures in full at the end or at SIGINT. The
    # ignored tests import packages that are missing here.
    options = shlex.split(
        f"-v -rN --maxfail=50 --durations=10 -p no:cacheprovider -n {workers} --dist worksteal "
        "--hypothesis-profile gpu --ignore=tests/benchmarks --ignore=tests/integrations --ignore=tests/study"
    )
    command = (python, "-m", "pytest", *options, "-m", which, *folders)
    return Stage("tests", command, limit, "tests.log")


def _sanitizer(python: str, tool: str, limit: float, *dtypes: str) -> Stage:
    # torch asks the driver for functions that it may lack, so API errors are not reported.
    options = f"--tool {tool} --error-exitcode 9 --print-limit 20 --report-api-errors no".split()
    kernels = (python, "-m", "tests.sanitize.every_kernel_once", "--dtypes", *dtypes)
    command = ("compute-sanitizer", *options, *kernels)
    caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(tool, command, limit, "sanitizers.log", environment=caching)


def plan(python: str, out: Path, rehearse: bool = False) -> dict[str, list[Stage]]:
    """Return the stages of each call, the least important last.

    A rehearsal needs no GPU; emulated kernels are slow, so only fast tests run.
    """
    module = (python, "-m")
    machine = (*module, "benchmarks.environment", str(out / "machine.json"))
    looks = [
        Stage("doctor", (*module, "steadygrad", "doctor"), 30 if rehearse else 15, "build.log"),
        Stage("machine", machine, 10, "build.log"),
    ]
    benchmark = (*module, "benchmarks", "--device")
    numbers = ("--out", str(out / "benchmark.json"))
    if rehearse:
        once = (*module, "tests.sanitize.every_kernel_once", "--emulate")
        folders = ("tests/clip", "tests/penalty", "tests/policies")
        return {
            "correctness": [
                *looks,
                Stage("each operation once", once, 120, "sanitizers.log"),
                _tests(python, TESTS.replace("gpu", "emulated"), 300, 1, *folders),
            ],
            "figures": [
                Stage("benchmark", (*benchmark, "emulated", *numbers), 300, "benchmark.log")
            ],
        }
    # Our kernels, and none of torch's, have our namespace in their names.
    options = shlex.split(
        "--clock-control none --csv --page raw --profile-from-start off "
        "--kernel-name-base demangled --kernel-name regex:steadygrad"
    )
    chosen = ("--metrics", ",".join(METRICS), "--log-file", str(out / "ncu.csv"))
    measured = ("cuda", "--limit", "135", *numbers)
    ncu = ("ncu", *options, *chosen, *module, "benchmarks.profiled_step")
    return {
        "correctness": [
            *_installs(python, 75),
            *looks,
            _sanitizer(python, "memcheck", 45, "float32", "bfloat16", "float16", "float64"),
            _tests(python, TESTS, 120, 8, "tests"),
            _sanitizer(python, "racecheck", 40, "float32", "bfloat16"),
            _sanitizer(python, "initcheck", 25, "float32", "bfloat16"),
        ],
        "figures": [
            *_installs(python, 50),
            Stage("benchmark", (*benchmark, *measured), 150, "benchmark.log"),
            Stage("profile", ncu, 40, "benchmark.log", optional=True),
        ],
    }


def run_stage(stage: Stage, out: Path, seconds: float, say: Say) -> Outcome:
    """Run one stage for at most `seconds`; its whole process group ends with it.

    Its output goes to its log line by line, and lines that look like failures are reported at once.
    """
    start = time.monotonic()
    environment = {**os.environ, "COLUMNS": "140", "PIP_NO_INDEX": "1", "PYTHONUNBUFFERED": "1"}
    # pip refuses build constraints for a build without isolation.
    environment.pop("PIP_BUILD_CONSTRAINT", None)
    try:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env={**environment, **stage.environment}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        return Outcome(stage, f"{error.filename} not found", 0.0)
    assert process.stdout is not None
    reader = Thread(target=_copy, args=(process.stdout, stage, out, say), daemon=True)
    reader.start()
    verdict = f"stopped after {seconds:.0f} s"
    try:
        code = process.wait(timeout=max(seconds - GRACE, 1.0))
        verdict = "ok" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            verdict += ", killed"
    finally:
        with suppress(ProcessLookupError):  # the group has already ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(GRACE)
    return Outcome(stage, verdict, time.monotonic() - start)


def _copy(output: IO[bytes], stage: Stage, out: Path, say: Say) -> None:
    with (out / stage.log).open("ab") as log, output:
        log.write(f"\n== {stage.name}: {shlex.join(stage.command)}\n".encode())
        for line in output:
            log.write(line)
            log.flush()
            if FAILURE.search(line):
                say(f"    {line.decode(errors='replace').rstrip()}")


def run_all(stages: Iterable[Stage], out: Path, say: Say) -> list[Outcome]:
    """Run the stages in turn; each is ended at its time on the schedule."""
    end = time.monotonic()
    outcomes: list[Outcome] = []
    for stage in stages:
        end += stage.limit
        if any(o.stage.name == stage.unless and o.verdict == "ok" for o in outcomes):
            outcome = Outcome(stage, f"not needed: {stage.unless}", 0.0)
        else:
            say(f"{stage.name} ...")
            outcome = run_stage(stage, out, end - time.monotonic(), say)
        say(f"{stage.name}: {outcome.seconds:.1f} s, {outcome.verdict}")
        if outcome.verdict != "ok" and not outcome.needless and (out / stage.log).exists():
            lines = (out / stage.log).read_text(encoding="utf-8", errors="replace").splitlines()
            say("\n".join(f"    {line}" for line in lines[-25:]))
        outcomes.append(outcome)
    return outcomes


def keep_result(out: Path, results: Path = RESULTS) -> Path | None:
    """Copy the benchmark's numbers to the results; return the path, or None without GPU numbers."""
    # This import needs torch, which the rest of the module does without.
    from benchmarks.results import file_name

    try:
        result = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if result["rehearsal"] or result["environment"]["gpu"] is None:
        return None
    results.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(out / "benchmark.json", results / file_name(result)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("call", nargs="?", choices=LIMITS, help="which call to make (default: both in turn)")
    option("--rehearse", action="store_true", help="emulated kernels, without a GPU")
    option("--dry", action="store_true", help="only print what would run")
    option("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: out/gpu")
    options = parser.parse_args(argv)
    # Stages find programs in the folder of this Python, and nvcc in its usual place.
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ["PATH"], f"{cuda}/bin"])
    out = options.out.resolve()
    calls = plan(sys.executable, out, options.rehearse)
    failed = 0
    for call, stages in calls.items():
        if options.call not in (None, call):
            continue
        if not options.dry:
            failed += run_call(call, stages, out)
            continue
        total = sum(stage.limit for stage in stages)
        sys.stdout.write(f"{call}: {total:.0f} s at most, into {', '.join(LOGS[call])}\n")
        for stage in stages:
            unless = f", unless {stage.unless} went well" if stage.unless else ""
            lacks = "" if shutil.which(stage.command[0]) else f", {stage.command[0]} not found"
            sys.stdout.write(f"  {stage.name}, {stage.limit:.0f} s{unless}{lacks}\n")
            sys.stdout.write(f"      {shlex.join(stage.command)}\n")
    if not options.dry and not options.rehearse and (kept := keep_result(out)):
        sys.stdout.write(f"Numbers copied to {kept}; make performance renews the page\n")
    return 1 if failed else 0


def run_call(call: str, stages: Sequence[Stage], out: Path) -> int:
    """Run a call; return how many of its stages failed.

    Messages also go to a file as they come.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in LOGS[call]:
        (out / name).unlink(missing_ok=True)
    with (out / f"{call}.txt").open("w", encoding="utf-8") as file:

        def say(text: str) -> None:
            for stream in (sys.stdout, file):
                stream.write(f"{text}\n")
                stream.flush()

        outcomes = run_all(stages, out, say)
        say(f"\n{call}")
        for outcome in outcomes:
            say(f"{outcome.stage.name:<20} {outcome.seconds:6.1f} s  {outcome.verdict}")
        failed = sum(outcome.failed for outcome in outcomes)
        total = sum(outcome.seconds for outcome in outcomes)
        say(f"{failed} of {len(outcomes)} stages failed, {total:.0f} s in all; logs are in {out}")
    return failed


if __name__ == "__main__":
    # A program started in the background ignores SIGINT, as would all that it starts, and SIGTERM
    # would leave its stages running.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
