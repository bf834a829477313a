"""The doctor, which is the package's whole command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steadygrad as sg
from steadygrad import doctor
from steadygrad.doctor import main
from tests.command_lines import run_to_exit
from tests.optim import unfused


def test_help_and_version(capsys: Any) -> None:
    code, text = run_to_exit(main, capsys, "--help")
    assert code == 0 and text.startswith("usage: steadygrad") and "check every kernel" in text
    version = f"steadygrad {doctor.installed_version('steadygrad')}\n"
    assert run_to_exit(main, capsys, "--version") == (0, version)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["repair"], "invalid choice: 'repair'"),
        (["study"], "invalid choice: 'study'"),
        (["doctor", "--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_bad_arguments_are_code_2(capsys: Any, argv: list[str], message: str) -> None:
    code, text = run_to_exit(main, capsys, *argv)
    assert code == 2
    assert message in text and "usage: steadygrad" in text


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "steadygrad", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("steadygrad ")


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", run)
    assert main([]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_needs_torch_and_numpy_alone() -> None:
    script = """
import sys
for name in ("rich", "matplotlib", "jinja2", "pandas", "scipy", "mlxtend", "pytest"):
    sys.modules[name] = None  # whoever imports it fails
from steadygrad.doctor import main
raise SystemExit(main([]))
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("All is well.\n")


@pytest.mark.parametrize("argv", [[], ["doctor"]], ids=["alone", "by name"])
def test_doctor_finds_all_well(capsys: Any, argv: list[str]) -> None:
    code = main(argv)
    text = capsys.readouterr().out
    assert code == 0, text
    assert "All is well." in text
    assert "FAIL" not in text
    assert "96 of 96 kernel checks passed." in text
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
    assert main([]) == 1
    text = capsys.readouterr().out
    assert "92 of 96 kernel checks passed." in text
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
    assert main([]) == 1
    text = capsys.readouterr().out
    every = "float32, float64, bfloat16, float16"
    assert f"- soft_threshold_: RuntimeError: no [kernel] here ({every})" in text
    assert "- get_total_norm, 2: error nan above 1.2e-07" in text
    assert "cpu: compiled, not usable" in text


def test_doctor_reports_a_rule_that_is_not_fused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sg.optim, "SGD", lambda params, **_: sg.Stabilizer(unfused.ASGD(params)))
    assert main([]) == 1
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
    "architectures": "sm_80, sm_90, compute_90 (PTX)",
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
        "backend": "cuda: compiled with CUDA 13.0 for sm_80, sm_90, compute_90 (PTX)",
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

    # A device that no kernel takes serves as a broken one.
    monkeypatch.setattr(doctor, "usable_devices", lambda *_: ["cpu", "meta"])
    assert main([]) == 1
    text = capsys.readouterr().out
    assert "Kernels on cpu: error" in text and "Kernels on meta: error" in text
    assert "96 of 192 kernel checks passed." in text
    assert "- AdamW, 2 fused steps on meta: " in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    command = [sys.executable, "-m", "steadygrad"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "standard output" in result.stderr
