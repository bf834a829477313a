"""The command line, and the doctor that it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steadygrad as sg
import steadygrad.bench
import steadygrad.study
from steadygrad import doctor
from steadygrad.cli import main
from steadygrad.study import Selection, Settings


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide and without colours, so that lines can be compared."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def exits(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run with arguments that end in the parser; return the exit code and what was printed."""

    def run(*argv: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as info:
            main(argv)
        captured = capsys.readouterr()
        assert isinstance(info.value.code, int)
        return info.value.code, captured.out + captured.err

    return run


# --- the parser ---


def test_help_names_every_command(exits: Any) -> None:
    code, text = exits("--help")
    assert code == 0
    for command in ("doctor", "bench", "study"):
        assert re.search(rf"^\s+{command}\s+\w", text, re.MULTILINE)


@pytest.mark.parametrize("command", ["doctor", "bench", "study"])
def test_each_command_has_help(exits: Any, command: str) -> None:
    code, text = exits(command, "--help")
    assert code == 0
    assert text.startswith(f"usage: steadygrad {command}")


def test_version(exits: Any) -> None:
    assert exits("--version") == (0, f"steadygrad {doctor.installed_version('steadygrad')}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: command"),
        (["repair"], "invalid choice: 'repair'"),
        (["doctor", "--quick"], "unrecognized arguments: --quick"),
        (["study", "--quick", "--full"], "expected one of them"),
        (["study", "--quick", "digits"], "is an experiment of its own"),
        (["study", "--jobs", "0"], "expected a whole number of at least 1, got '0'"),
        (["bench", "--threads", "0"], "expected a whole number of at least 1, got '0'"),
        (["bench", "--threads", "many"], "expected a whole number of at least 1, got 'many'"),
        (["bench", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["bench", "--limit", "0"], "expected a number of seconds above 0, got '0'"),
        (["bench", "--limit", "soon"], "expected a number of seconds above 0, got 'soon'"),
        (["bench", "--from", "a.json"], "--from makes a page of a result: add --page FILE"),
        (
            ["bench", "--from", "a.json", "--page", "a.html", "--quick", "--threads", "1"],
            "--from measures nothing: leave out --quick, --threads",
        ),
        (["study", "--quick", "--out"], "expected one argument"),
    ],
)
def test_bad_arguments_are_code_2(exits: Any, argv: list[str], message: str) -> None:
    code, text = exits(*argv)
    assert code == 2
    assert message in text
    assert "usage: steadygrad" in text


def test_out_that_cannot_be_written_is_refused_first(exits: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for argv in (
        ["study", "--quick", "--out", str(file)],
        ["study", "--quick", "--out", str(file / "below")],
        ["bench", "--out", str(tmp_path)],
        ["bench", "--page", str(tmp_path)],
        ["bench", "--page", str(file / "below.html")],
    ):
        code, text = exits(*argv)
        assert code == 2
        assert f"{argv[-2]} {argv[-1]}: " in text and "name " in text


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "steadygrad", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("steadygrad ")


# --- bench and study are handed their options ---


@pytest.mark.parametrize("code", [0, 1])
def test_bench_is_wired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    calls = []

    def run(console: Any, **options: Any) -> int:
        calls.append(options)
        return code

    monkeypatch.setattr(steadygrad.bench, "run", run)
    out, page = tmp_path / "new" / "bench.json", tmp_path / "newer" / "bench.html"
    assert main(["bench", "--quick", "--out", str(out), "--threads", "1"]) == code
    more = ["--limit", "90", "--page", str(page), "--targets"]
    assert main(["bench", "--device", "cuda", *more]) == code
    assert calls == [
        {"quick": True, "out": out, "page": None, "threads": 1, "device": "cpu", "limit": None}
        | {"targets": False},
        {"quick": False, "out": None, "page": page, "threads": None, "device": "cuda", "limit": 90}
        | {"targets": True},
    ]
    assert out.parent.is_dir() and page.parent.is_dir()


@pytest.mark.parametrize("code", [0, 1])
def test_study_is_wired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    calls = []

    def run_study(selection: Any, settings: Any, console: Any) -> int:
        calls.append((selection, settings))
        return code

    monkeypatch.setattr(steadygrad.study, "run_study", run_study)
    monkeypatch.chdir(tmp_path)
    assert main(["study", "--quick", "--out", "a/b", "--threads", "2"]) == code
    options = ["--jobs", "3", "--limit", "9", "--seeds", "2", "--arms", "x, y", "--data", "d"]
    assert main(["study", "digits", "mine.py", "--full", "--restart", *options]) == code
    assert main(["study"]) == code
    selections, settings = zip(*calls, strict=True)
    assert selections == (
        Selection(mode="quick"),
        Selection(("digits", "mine.py"), "full", 2, ("x", "y"), "d"),
        Selection(),
    )
    assert settings == (
        Settings(Path("a/b"), threads=2),
        Settings(Path("out"), jobs=3, limit_s=9.0, restart=True),
        Settings(Path("out")),
    )
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "out").is_dir()


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(console: Any, **options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(steadygrad.bench, "run", run)
    assert main(["bench"]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_bench_says_why_a_device_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(steadygrad.bench.environment, "cuda_info", dict)
    assert main(["bench", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == ("bench: --device cuda: steadygrad was built without CUDA\n")


def test_without_rich_the_bench_is_plain_and_the_study_asks_for_it() -> None:
    script = """
import sys
sys.modules["rich"] = sys.modules["rich.console"] = None
import steadygrad.bench
from steadygrad.bench import device, shapes
from steadygrad.bench.cases import OPERATIONS, ModelCase
from steadygrad.bench.measure import Effort
from steadygrad.cli import main
device.CASES = [ModelCase(OPERATIONS["clip_active"], shapes.many_small(2, 32), host_cost=True)]
device.FULL = steadygrad.bench.QUICK = Effort(0.0, 2, 2)
assert main(["bench"]) == 0
assert main(["doctor"]) == 0
assert main(["study", "--quick", "--out", sys.argv[1]]) == 1
"""
    result = subprocess.run(
        [sys.executable, "-c", script, "."], capture_output=True, text=True, check=True
    )
    assert re.search(
        r"^  2 x 32 +torch foreach +[\d.]+ +[\d.]+ +[\d.]+ ", result.stdout, re.MULTILINE
    )
    assert "\x1b" not in result.stdout
    assert "All is well." in result.stdout
    assert result.stderr == "study needs rich: pip install rich\n"


# --- doctor ---


def test_doctor_finds_all_well(capsys: Any) -> None:
    code = main(["doctor"])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "All is well." in text
    assert "FAIL" not in text
    assert "68 of 68 kernel checks passed." in text
    for line in (
        rf"torch +{re.escape(torch.__version__)}",
        r"backend +cpu: compiled, usable",
        r"instruction set +(baseline|avx2|avx512)",
        r"OpenMP +.*\(the copy torch uses\)" if sys.platform == "linux" else r"OpenMP +",
        r"threads +\d+",
        r"DLPack exchange API +1\.\d+ on torch\.Tensor, 1\.\d+ compiled in: compatible",
        r"add_penalty_ +ok .*ok .*ok .*ok ",
        r"AdamW, 2 fused steps +ok .*ok .*ok .*ok ",
        r"batch_norm +ok .*ok .*ok .*ok ",
        r"batch_norm, add, relu +ok .*ok .*ok .*ok ",
        r"batch_norm, inference +ok .*ok .*ok .*ok ",
    ):
        assert re.search(rf"^ *{line}", text, re.MULTILINE), line


def test_doctor_reports_wrong_numbers(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    intact = sg.clip_grad_value_

    def broken(params: Any, clip_value: float) -> None:
        intact(params, clip_value * 1.5)

    monkeypatch.setattr(sg, "clip_grad_value_", broken)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "64 of 68 kernel checks passed." in text
    assert re.search(r"^ *clip_grad_value_ +FAIL 5e-01", text, re.MULTILINE)
    assert re.search(r"- clip_grad_value_: error 5.0e-01 above 5.0e-07 \(float32\)", text)
    assert "wrong results: reinstall it" in text
    assert "All is well" not in text


def test_doctor_reports_nan_and_raising_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def raising(params: Any, amount: float) -> None:
        raise RuntimeError("no [kernel] here")

    monkeypatch.setattr(sg, "soft_threshold_", raising)
    monkeypatch.setattr(sg, "get_total_norm", lambda *_: torch.tensor(float("nan")))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    every = "float32, float64, bfloat16, float16"
    assert f"- soft_threshold_: RuntimeError: no [kernel] here ({every})" in text
    assert "- get_total_norm, 2: error nan above 1.2e-07" in text
    assert "cpu: compiled, not usable" in text


def test_doctor_reports_a_rule_that_is_not_fused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        sg.optim, "SGD", lambda params, **_: sg.Stabilizer(torch.optim.ASGD(params))
    )
    assert main(["doctor"]) == 1
    assert "SGD, 2 fused steps: RuntimeError: expected the fused path, got 'in-place" in (
        capsys.readouterr().out
    )


def test_doctor_explains_a_torch_without_the_exchange_api() -> None:
    early = SimpleNamespace(Tensor=object, __version__="2.10.0a0")
    (fact,) = doctor.dlpack_facts(early, sg._kernels)
    assert fact.value == "torch 2.10.0a0 has none"
    assert "pip install --upgrade 'torch>=2.10'" in fact.remedy


def test_doctor_explains_another_major_version_of_dlpack() -> None:
    kernels = SimpleNamespace(build_info=lambda: {"dlpack_version": (99, 0)})
    (fact,) = doctor.dlpack_facts(torch, kernels)
    assert "99.0 compiled in: not compatible" in fact.value
    assert fact.remedy


def test_doctor_explains_a_second_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_openmp", lambda: "elsewhere/libgomp.so.1")
    info = {**sg._kernels.build_info(), "openmp_library": "here/libgomp.so.1"}
    kernels = SimpleNamespace(__file__="file", build_info=lambda: info)
    facts = {fact.name: fact for fact in doctor.extension_facts(sg, kernels)}
    assert "torch uses elsewhere/libgomp.so.1" in facts["OpenMP"].value
    assert "LD_PRELOAD" in facts["OpenMP"].remedy


# --- doctor on CUDA, which the extension describes in build_info ---

COMPILED = {
    "compiled": True,
    "architectures": "80;90",
    "runtime_version": 13000,
    "driver_version": 13010,
    "problem": "",
    "devices": [{"name": "NVIDIA Test", "major": 9, "minor": 0, "usable": True}],
}


def facts_about(info: dict[str, Any], seen: bool) -> dict[str, doctor.Fact]:
    kernels = SimpleNamespace(build_info=lambda: info)
    torch_ = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: seen), __version__="2.11.0+cpu"
    )
    return {fact.name: fact for fact in doctor.cuda_facts(torch_, kernels)}


def test_doctor_shows_a_usable_gpu() -> None:
    facts = facts_about({"cuda": COMPILED}, seen=True)
    assert {name: fact.value for name, fact in facts.items()} == {
        "backend": "cuda: compiled with CUDA 13.0 for sm_80, sm_90",
        "CUDA driver": "for CUDA 13.1",
        "CUDA device 0": "NVIDIA Test, sm_90: usable",
    }
    assert not any(fact.remedy for fact in facts.values())


@pytest.mark.parametrize("info", [{}, {"cuda": {"compiled": False}}], ids=["old", "without"])
def test_doctor_takes_a_build_without_kernels_for_gpus(info: dict[str, Any]) -> None:
    (fact,) = facts_about(info, seen=False).values()
    assert (fact.value, fact.remedy) == ("cuda: not compiled", "")
    (fact,) = facts_about(info, seen=True).values()
    assert fact.value == "cuda: not compiled, though torch sees a GPU"
    assert "nvcc" in fact.remedy


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"driver_version": 0, "problem": "no NVIDIA driver"}, "no NVIDIA driver, so only"),
        ({"problem": "CUDA error cudaErrorNoDevice: no device"}, "none, so only the"),
        ({}, "none, so only the"),
    ],
    ids=["no driver", "hidden", "none"],
)
def test_doctor_is_content_without_a_gpu(changes: dict[str, Any], value: str) -> None:
    facts = facts_about({"cuda": {**COMPILED, "devices": [], **changes}}, seen=False)
    assert not any(fact.remedy for fact in facts.values())
    assert any(fact.value.startswith(value) for fact in facts.values())


def test_doctor_explains_a_gpu_that_cannot_be_used() -> None:
    advice = "expected a driver for CUDA 13.0 or later, got one for CUDA 12.2. Update it"
    old = {**COMPILED, "driver_version": 12020, "problem": advice, "devices": []}
    facts = facts_about({"cuda": old}, seen=True)
    assert facts["CUDA driver"] == doctor.Fact("CUDA driver", "for CUDA 12.2", advice)

    other = {"name": "NVIDIA Other", "major": 7, "minor": 0, "usable": False}
    facts = facts_about({"cuda": {**COMPILED, "devices": [other]}}, seen=True)
    assert facts["CUDA device 0"].value == "NVIDIA Other, sm_70: not usable"
    assert "CUDAARCHS=70 pip install" in facts["CUDA device 0"].remedy

    facts = facts_about({"cuda": COMPILED}, seen=False)
    assert facts["CUDA in torch"].value == "torch 2.11.0+cpu sees no GPU"
    assert "build for CUDA" in facts["CUDA in torch"].remedy


def test_doctor_checks_every_usable_device(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def usable(seen: bool, *devices: bool) -> list[str]:
        torch_ = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: seen))
        info = {"cuda": {**COMPILED, "devices": [{"usable": known} for known in devices]}}
        return doctor.usable_devices(torch_, SimpleNamespace(build_info=lambda: info))

    assert usable(True, True) == ["cpu", "cuda"]
    assert usable(True, False) == usable(False, True) == usable(True) == ["cpu"]

    # A device that no kernel takes stands for a broken one.
    monkeypatch.setattr(doctor, "usable_devices", lambda *_: ["cpu", "meta"])
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "Kernels on cpu: error" in text and "Kernels on meta: error" in text
    assert "68 of 136 kernel checks passed." in text
    assert "- AdamW, 2 fused steps on meta: " in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", [["doctor"], ["study", "--list"]], ids=" ".join)
def test_a_full_disk_behind_standard_output_is_one_line(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "steadygrad", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "standard output" in result.stderr
