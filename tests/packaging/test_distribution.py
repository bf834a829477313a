"""What is published: the package's metadata, the files of a wheel, and links that work outside a clone."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

import steadygrad

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "https://github.com/steadygrad/steadygrad"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links that do not work on PyPI (README) or on the pages made of docs."""
    found = []
    for link in LINK.findall(text):
        target = link.partition("#")[0]
        ours = re.fullmatch(rf"{REPOSITORY}/(blob|tree)/main/(.+)", target)
        if ours:
            path = ROOT / ours.group(2)
            wrong = not (path.is_dir() if ours.group(1) == "tree" else path.is_file())
        elif target.startswith(("http://", "https://")) or not target:
            wrong = False
        else:
            path = (page.parent / target).resolve()
            wrong = page.name == "README.md" or not path.is_relative_to(ROOT / "docs")
            wrong = wrong or not path.exists()
        if wrong:
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_work_where_the_page_is_published(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("README.md", "docs/decisions.md"),
        ("README.md", f"{REPOSITORY}/blob/main/docs/none.md"),
        ("README.md", f"{REPOSITORY}/blob/main/docs"),
        ("docs/study.md", "none.md"),
        ("docs/study.md", "../examples/plain_loop.py"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(page: str, link: str) -> None:
    assert broken_links(ROOT / page, f"[text]({link})") == [link]


def test_every_page_of_docs_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- (\S+\.md)$", read("mkdocs.yml"), re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(p.read_text("utf-8") for p in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    public = {f"steadygrad.{name}" for name in steadygrad.__all__ if name[0] != "_"}
    public |= {f"steadygrad.optim.{name}" for name in steadygrad.optim.__all__}
    assert public - shown - {"steadygrad.optim"} == set()


def test_citation_has_the_version_of_the_package() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    assert re.findall(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE) == [version]


def test_wheels_are_built_for_the_pythons_that_are_named() -> None:
    text = read("pyproject.toml")
    named = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)
    (build,) = re.findall(r'^build = "(.+)"$', text, re.MULTILINE)
    assert build.split() == [f"cp3{minor}-*" for minor in named]
    assert f'requires-python = ">=3.{named[0]}"' in text


def test_installed_files_are_the_package_and_nothing_else() -> None:
    package = Path(steadygrad.__file__).parent
    recorded = metadata.files("steadygrad") or []
    if not any(file.locate() == package / "__init__.py" for file in recorded):
        pytest.skip("steadygrad is not installed from a wheel")
    installed = {file.as_posix() for file in recorded if file.suffix not in {".pyc"}}
    source = ROOT / "python"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "steadygrad").rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so"}
    }
    beside = {file for file in installed - expected if ".dist-info/" not in file}
    extensions = {file for file in beside if re.fullmatch(r"steadygrad/_kernels\..+\.so", file)}
    assert expected <= installed
    assert len(extensions) == 1
    # These are the script, and the module that only a build for the tests has.
    others = {Path(file).name.partition(".")[0] for file in beside - extensions}
    assert others <= {"steadygrad", "steadygrad_emulated"}
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in installed)
