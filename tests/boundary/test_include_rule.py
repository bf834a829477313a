"""Checks which layer may include which in csrc, and what the built extension may depend on."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import steadygrad._kernels as kernels

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

# By layer: the layers that it may include, and the outside headers beside the C++ standard library.
RULE = {
    "core": ({"core"}, set()),
    "cpu": ({"core", "cpu"}, {"dlfcn.h", "immintrin.h", "link.h", "unistd.h"}),
    "cuda": ({"core", "cuda"}, {"cooperative_groups.h", "cuda_runtime.h"}),
    # The emulation replaces the CUDA runtime.
    "emulation": (
        {"emulation"},
        {"cuda_runtime.h", "link.h", "math.h", "sanitizer/", "sys/mman.h", "unistd.h"},
    ),
    "bindings": ({"core", "cpu", "bindings"}, {"Python.h", "pybind11/", "dlpack/"}),
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def violations(layer: str, text: str) -> list[str]:
    """Return the includes in the text of a file that its layer may not have."""
    layers, outside = RULE[layer]
    found = []
    for bracket, header in INCLUDE.findall(text):
        # <vector>, <cmath>: only headers of the C++ standard library have neither folder nor extension.
        standard = bracket == "<" and re.fullmatch(r"\w+", header)
        ours = bracket == '"' and header.split("/")[0] in layers and "/" in header
        allowed = any(header == name or header.startswith(name) for name in outside)
        if not (standard or ours or allowed):
            found.append(header)
    return found


def sources() -> list[Path]:
    paths = [
        *CSRC.rglob("*"),
        *(ROOT / "tests" / "emulation").rglob("*.h"),
        *(ROOT / "tests" / "emulation").glob("*.cpp"),
    ]
    return sorted(path for path in paths if path.suffix in {".h", ".cpp", ".cu", ".cuh"})


def test_there_are_sources_in_known_layers_only() -> None:
    assert sources()
    assert {path.name for path in CSRC.iterdir()} <= set(RULE) - {"emulation"}


def test_files_include_only_what_their_layer_may() -> None:
    found = {}
    for path in sources():
        layer = path.relative_to(CSRC if path.is_relative_to(CSRC) else ROOT / "tests").parts[0]
        found[path.name] = violations(layer, path.read_text(encoding="utf-8"))
    assert {file: headers for file, headers in found.items() if headers} == {}


REFUSED = [
    ("core", '"cpu/parallel.h"'),
    ("core", '"bindings/tensor.h"'),
    ("core", "<Python.h>"),
    ("core", "<dlpack/dlpack.h>"),
    ("core", "<omp.h>"),
    ("cpu", '"bindings/tensor.h"'),
    ("cpu", "<pybind11/pybind11.h>"),
    ("cpu", "<omp.h>"),
    ("cpu", '"cuda/launch.h"'),
    ("cuda", '"cpu/parallel.h"'),
    ("cuda", '"emulation/launch.h"'),
    ("cuda", "<dlpack/dlpack.h>"),
    ("emulation", '"core/norm.h"'),
    ("emulation", '"cuda/launch.h"'),
    ("bindings", '"cuda/launch.h"'),
    ("bindings", '"emulation/launches.h"'),
    ("bindings", "<torch/extension.h>"),
    ("bindings", "<ATen/dlpack.h>"),
    ("bindings", '"c10/core/Device.h"'),
    ("bindings", '"tensor.h"'),
]


@pytest.mark.parametrize(("layer", "header"), REFUSED, ids=range(len(REFUSED)))
def test_rule_refuses(layer: str, header: str) -> None:
    assert violations(layer, f"  #  include {header}\n") == [header.strip('<>"')]


def test_rule_allows_each_layer_what_is_its_own() -> None:
    assert violations("core", '#include "core/norm.h"\n#include <cmath>\n') == []
    assert violations("cpu", '#include "core/norm.h"\n#include <dlfcn.h>\n') == []
    assert violations("bindings", '#include <pybind11/stl.h>\n#include "cpu/parallel.h"\n') == []


def test_build_neither_requires_nor_finds_torch() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requires = re.search(r"^requires = \[(.*?)\]", pyproject, re.MULTILINE | re.DOTALL)
    assert requires is not None
    assert "torch" not in requires.group(1)
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert not re.search(r"find_package\(\s*(Torch|OpenMP)|torch_library|libtorch|-fopenmp", cmake)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the dependencies of an ELF file")
def test_extension_links_neither_torch_nor_openmp() -> None:
    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("needs ldd")
    result = subprocess.run([ldd, kernels.__file__], capture_output=True, text=True, check=True)
    assert "libc.so" in result.stdout
    assert not re.search(r"lib(torch|c10|gomp|iomp|omp|python|cuda)", result.stdout), result.stdout
    assert "not found" not in result.stdout, result.stdout
