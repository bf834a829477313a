"""The emulator of CUDA runs correct kernels correctly, and notices wrong ones."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATION = ROOT / "tests" / "emulation"
PROGRAMS = ("features", "defects", "launches")
EMULATOR = sorted(EMULATION.glob("*.cpp"))

SANITIZERS = {
    "optimized": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
OPTIONS = {
    # Leaks cannot be found on machines that do not allow a debugger to attach.
    "ASAN_OPTIONS": "detect_leaks=0",
    # This leaves out the second for which TSan waits for other threads at the end.
    "TSAN_OPTIONS": "atexit_sleep_ms=0",
}
COMPILE = [
    *("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"),
    *(f"-I{EMULATION / 'include'}", f"-I{EMULATION.parent}", f"-I{CSRC}", "-pthread"),
]

# By build: how a seeded defect shows there.
WRONG = {"optimized": "wrong", "address": "wrong"}
DIAGNOSIS = {"optimized": "diagnosis", "address": "diagnosis", "thread": "diagnosis"}
FINDINGS = {
    "missing_barrier": {**WRONG, "thread": "race"},
    "overwritten_too_early": {**WRONG, "thread": "race"},
    "missing_syncwarp": {**WRONG, "thread": "race"},
    "divergent_barrier": DIAGNOSIS,
    "barrier_in_branch": DIAGNOSIS,
    "shuffle_in_branch": DIAGNOSIS,
    "shuffle_after_exit": DIAGNOSIS,
    "outside_shared_memory": {"address": "undefined"},
    "outside_dynamic_shared_memory": {"address": "address"},
    "outside_global_memory": {"address": "address", "thread": "race"},
    "misaligned_vector": {"optimized": "wrong", "address": "undefined", "thread": "wrong"},
    "uninitialized_shared_memory": {**WRONG, "thread": "wrong"},
    "sum_without_atomic": {"thread": "race"},
    "missing_grid_sync": {**WRONG, "thread": "race"},
    "grid_sync_by_some": DIAGNOSIS,
    "missing_fence": {"thread": "race"},
}
BLOCK_AND_THREAD = r" in block \(0,0,0\), thread \(\d+,0,0\)"
REASONS = {
    "divergent_barrier": r"divergent barrier: this thread is at __syncthreads .+defects.cu:\d+ "
    r"while others wait at .+defects.cu:\d+" + BLOCK_AND_THREAD,
    "barrier_in_branch": r"deadlock: no thread can continue: .*100 threads \(first 0\) in "
    r"__syncthreads .+defects.cu:\d+; .*128 threads \(first 128\) exited;" + BLOCK_AND_THREAD,
    "shuffle_in_branch": r"deadlock: no thread can continue: 8 threads \(first 0\) in a warp "
    r"function .+defects.cu:\d+; 248 threads \(first 8\) in __syncthreads"
    + r".*"
    + BLOCK_AND_THREAD,
    "shuffle_after_exit": r"(thread exits while lane \d waits for it at .+defects.cu:\d+|"
    r".+defects.cu:\d+: mask ffffffff names lanes [0-9a-f]{8} that have exited or do not exist)"
    + BLOCK_AND_THREAD,
    "grid_sync_by_some": r"block (3 exits while other blocks wait in grid.sync\(\)|"
    r"\d reaches grid.sync\(\) after another block exited)",
}
LAUNCH = r" \[launch \d+, STEADYGRAD_EMULATION_SEED=1\]"


@dataclass
class Build:
    """The programs, compiled in one way."""

    folder: Path
    missing: str = ""  # why this build is not there
    fills_variables: bool = True  # whether shared variables are filled before each block
    prefix: list[str] = field(default_factory=list)

    def run(self, program: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        """Run a program; ``settings`` are variables of the emulator, without their prefix."""
        if self.missing:
            pytest.skip(self.missing)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("STEADYGRAD_EMULATION_")
        }
        environment |= OPTIONS
        environment |= {f"STEADYGRAD_EMULATION_{name}": value for name, value in settings.items()}
        return subprocess.run(
            [*self.prefix, str(self.folder / program), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=100,
        )


def compile_cpp(compiler: str, *arguments: object) -> None:
    command = [compiler, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


def probe(compiler: str, build: Build, flags: list[str]) -> None:
    """Find out whether programs of this build compile, and how they run, on this machine."""
    source = build.folder / "probe.cpp"
    source.write_text("int main() {}\n")
    program = build.folder / "probe"
    command = [compiler, *flags, str(source), "-o", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        result = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        # Older ThreadSanitizers do not know the address layout of newer kernels.
        build.prefix = ["setarch", platform.machine(), "--addr-no-randomize"]
        command = [*build.prefix, str(program)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        build.missing = f"{' '.join(flags)} does not work here: {result.stderr.strip()[:300]}"


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Build]]:
    """Compile emulator and programs with and without sanitizers, several files at a time."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler named c++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    clang = "clang" in version.lower()
    # Its files together take a third of the time that they take one by one.
    emulator = tmp_path_factory.mktemp("emulator") / "emulator.cpp"
    emulator.write_text("".join(f'#include "{path}"\n' for path in EMULATOR))
    sources = [emulator, *(EMULATION / f"{program}.cu" for program in PROGRAMS)]
    made = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects: dict[str, list[Future[None]]] = {}
        for name, flags in SANITIZERS.items():
            build = made[name] = Build(tmp_path_factory.mktemp(name))
            build.fills_variables = name == "optimized" or not clang
            probe(compiler, build, flags)
            if build.missing:
                continue
            objects[name] = [
                pool.submit(
                    compile_cpp,
                    *(compiler, *COMPILE, *flags, "-x", "c++", "-c", source),
                    *("-o", build.folder / f"{source.stem}.o"),
                )
                for source in sources
            ]
        for name, futures in objects.items():
            for future in futures:
                future.result()
            folder = made[name].folder
            for program in PROGRAMS:
                objects_of = (folder / f"{program}.o", folder / "emulator.o")
                linked = (*objects_of, "-o", folder / program)
                compile_cpp(compiler, *SANITIZERS[name], "-pthread", *linked)
    yield made


@pytest.fixture(params=SANITIZERS)
def build(request: pytest.FixtureRequest, builds: dict[str, Build]) -> Build:
    """Return one build after the other."""
    return builds[request.param]


def findings(result: subprocess.CompletedProcess) -> set[str]:
    """Return what a run of a defect showed."""
    marks = {
        "race": "ThreadSanitizer: data race",
        "address": "ERROR: AddressSanitizer",
        "undefined": "runtime error:",
    }
    found = {name for name, text in marks.items() if text in result.stderr}
    lines = set(result.stdout.splitlines())
    found |= {"right", "wrong"} & lines
    if any(line.startswith("cudaErrorLaunchFailure: ") for line in lines):
        found.add("diagnosis")
    # A kernel that kills the process was noticed, too.
    if result.returncode < 0:
        found.add("wrong")
    return found


def test_every_feature_works(build: Build) -> None:
    result = build.run("features")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert "launches: 52" in result.stdout


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_every_feature_works_in_another_order(builds: dict[str, Build], order: str) -> None:
    result = builds["optimized"].run("features", ORDER=order, THREADS="3")
    assert result.returncode == 0, result.stdout + result.stderr


def test_all_defects_are_known(builds: dict[str, Build]) -> None:
    result = builds["optimized"].run("defects")
    assert result.stdout.split() == list(FINDINGS)
    assert all(FINDINGS.values())


@pytest.mark.parametrize("name", FINDINGS)
def test_right_kernel_is_right(build: Build, name: str) -> None:
    result = build.run("defects", name, "right", "5")
    assert (result.stdout.split(), result.stderr, result.returncode) == (["right"] * 5, "", 0)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_right_kernels_are_right_in_another_order(builds: dict[str, Build], order: str) -> None:
    for name in FINDINGS:
        result = builds["optimized"].run("defects", name, "right", "2", ORDER=order)
        assert result.stdout.split() == ["right", "right"], name


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for name, kinds in FINDINGS.items() for kind in kinds]
)
def test_defect_is_noticed(builds: dict[str, Build], kind: str, name: str) -> None:
    if name == "uninitialized_shared_memory" and not builds[kind].fills_variables:
        pytest.skip("Clang's sanitizers have variables of their own among the shared ones")
    rounds = "20" if kind == "optimized" else "1"
    result = builds[kind].run("defects", name, "wrong", rounds)
    assert FINDINGS[name][kind] in findings(result), result.stdout + result.stderr


@pytest.mark.parametrize("name", REASONS)
def test_failure_names_reason_place_and_seed(builds: dict[str, Build], name: str) -> None:
    lines = builds["optimized"].run("defects", name, "wrong", "20").stdout.splitlines()
    assert len(lines) == 20
    for line in lines:
        assert re.fullmatch("cudaErrorLaunchFailure: " + REASONS[name] + LAUNCH, line), line


def test_seed_decides(builds: dict[str, Build]) -> None:
    def failing_threads(seed: str) -> str:
        command = ("defects", "shuffle_after_exit", "wrong", "10")
        return builds["optimized"].run(*command, SEED=seed).stdout

    assert failing_threads("7") == failing_threads("7")
    same = failing_threads("8").replace("SEED=8", "SEED=7")
    assert failing_threads("7") != same


def test_uninitialized_memory_goes_unnoticed_without_poison(builds: dict[str, Build]) -> None:
    command = ("defects", "uninitialized_shared_memory", "wrong", "1")
    assert builds["optimized"].run(*command, POISON="0").stdout == "right\n"


def test_nothing_is_printed_unless_asked_for(builds: dict[str, Build]) -> None:
    command = ("defects", "divergent_barrier", "wrong", "1")
    assert builds["optimized"].run(*command).stderr == ""
    verbose = builds["optimized"].run(*command, VERBOSE="1").stderr
    assert re.match(r"steadygrad: divergent barrier: .*\n$", verbose)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("ORDER", "sideways", "random, forward or reverse"),
        ("THREADS", "0", "a number from 1 to 1024"),
        ("SEED", "x", "a number from 0 to 18446744073709551615"),
        ("STACK", "", "a number from 32768 to 67108864"),
    ],
)
def test_setting_without_sense_fails_the_launch(
    builds: dict[str, Build], setting: str, value: str, expected: str
) -> None:
    result = builds["optimized"].run("defects", "missing_fence", "right", "1", **{setting: value})
    message = f"STEADYGRAD_EMULATION_{setting}: expected {expected}, got '{value}'"
    assert result.stdout == f"cudaErrorLaunchFailure: {message}\n"


def test_errors_have_the_codes_of_the_runtime(build: Build) -> None:
    result = build.run("launches", "errors")
    assert (result.stderr, result.returncode) == ("", 0)
    printed = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    reason = printed.pop("reason")
    place = r"__trap\(\) at .+launches.cu:\d+ in block \(2,0,0\), thread \(5,0,0\)"
    assert re.fullmatch(place + LAUNCH, reason)
    assert printed == {
        "no threads": "cudaErrorInvalidConfiguration",
        "no blocks": "cudaErrorInvalidConfiguration",
        "1025 threads": "cudaErrorInvalidConfiguration",
        "32 x 33 threads": "cudaErrorInvalidConfiguration",
        "65 threads in z": "cudaErrorInvalidConfiguration",
        "65536 blocks in y": "cudaErrorInvalidConfiguration",
        "shared memory without asking": "cudaErrorInvalidValue",
        "asked for too much": "cudaErrorInvalidValue",
        "asked": "cudaSuccess",
        "shared memory after asking": "cudaSuccess",
        "attribute": "cudaSuccess",
        "occupancy": "cudaSuccess",
        "cooperative": "cudaSuccess",
        "cooperative, one block more": "cudaErrorCooperativeLaunchTooLarge",
        "not cooperative, one block more": "cudaSuccess",
        "other device": "cudaErrorInvalidDevice",
        "kept": "cudaErrorInvalidDevice",
        "taken": "cudaErrorInvalidDevice",
        "after that": "cudaSuccess",
        "trap": "cudaErrorLaunchFailure",
        "launch after a failed one": "cudaSuccess",
        "launches": "4",
    }


def test_later_launches_start_no_threads(build: Build) -> None:
    assert "started later: 0\n" in build.run("launches", "threads").stdout


def test_variables_of_the_launching_thread_are_left_alone(build: Build) -> None:
    assert build.run("launches", "variables").stdout == "variable: 0\n"


@pytest.mark.parametrize("kind", ["optimized", "address"])  # TSan allows no threads after fork
def test_launches_go_on_after_fork(builds: dict[str, Build], kind: str) -> None:
    result = builds[kind].run("launches", "fork")
    assert result.stdout == "before: 1\nchild: 0\nafter: 1\n", result.stderr
