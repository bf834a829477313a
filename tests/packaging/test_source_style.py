"""Rules for source files that no linter knows: names, output, paths."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".ci", "benchmarks", "cmake", "csrc", "docs", "examples", "python", "study", "tests")
SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".py", ".pyi"}
TEXT_SUFFIXES = SOURCE_SUFFIXES | {"", ".cmake", ".json", ".md", ".toml", ".txt"}

# These names say nothing about what a file or folder does.
EMPTY_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|mnt|opt|root|tmp|work|Users)/\w")
OUTPUT = re.compile(r"std::(?:cout|cerr|clog|exit|abort)\b|\b(?:f?printf|f?puts|exit|abort)\s*\(")


def files(suffixes: set[str]) -> list[Path]:
    paths = [path for path in ROOT.iterdir() if path.name != ".git"]
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob("*")
    ignored = {"__pycache__"}
    return sorted(
        path
        for path in paths
        if path.is_file() and path.suffix in suffixes and not ignored & set(path.parts)
    )


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_two_parts_of_the_package_import_each_other() -> None:
    package = ROOT / "python" / "steadygrad"
    imports: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part == "__init__":
            continue  # it collects what the parts offer
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.ImportFrom) and statement.module is not None:
                root, _, rest = statement.module.partition(".")
                if root == "steadygrad" and rest and rest.split(".")[0] != part:
                    imports.setdefault(part, set()).add(rest.split(".")[0])
    assert {"policies", "telemetry"} <= imports["optim"]
    tuple(graphlib.TopologicalSorter(imports).static_order())  # raises if there is a cycle


def test_names_say_what_files_and_folders_do() -> None:
    paths = [path.relative_to(ROOT) for path in files(SOURCE_SUFFIXES)]
    assert [path for path in paths if {Path(part).stem for part in path.parts} & EMPTY_NAMES] == []


def test_no_path_of_somebodys_machine() -> None:
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in files(TEXT_SUFFIXES)
        for number, line in enumerate(lines(path), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_cpp_neither_prints_nor_exits() -> None:
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in files({".cpp", ".h"})
        if path.is_relative_to(ROOT / "csrc")
        for number, line in enumerate(lines(path), 1)
        if OUTPUT.search(line)
    ]
    assert found == []
