"""Which source a measurement belongs to: its commit, and the tree of the kernels."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import steadygrad as sg

UNKNOWN = "unknown"

# Names the commit where the files came without their history.
REVISION_VARIABLE = "STEADYGRAD_REVISION"


@dataclass(frozen=True)
class Source:
    """Where the code came from.

    Attributes:
        revision: commit of the checkout that the command runs in, with "-dirty" when files differ;
            outside one the commit that the package was built from; else "unknown".
        csrc_tree: git's name for the files in csrc as they are: what `git rev-parse HEAD:csrc`
            gives once they are committed; "unknown" without them.
        csrc_state: "committed", "uncommitted changes", or "unknown" without git's history.
    """

    revision: str
    csrc_tree: str
    csrc_state: str


def checkout(start: Path) -> Path | None:
    """The folder of steadygrad's source that `start` is in, or None."""
    for folder in (start, *start.parents):
        try:
            text = (folder / "pyproject.toml").read_text(encoding="utf-8")
        except OSError:
            continue
        if 'name = "steadygrad"' in text and (folder / "csrc").is_dir():
            return folder
    return None


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints in `folder`; None where it fails or is missing."""
    # A copied checkout may belong to another user, which git refuses unless told otherwise.
    command = ["git", "-c", "safe.directory=*", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def tree_name(folder: Path) -> str:
    """The name that git would give the files in `folder`, which need not be under git.

    Files that builds leave behind, and empty folders, do not count.
    """
    name = _tree(folder)
    return name.hex() if name else UNKNOWN


def _tree(folder: Path) -> bytes:
    entries: list[tuple[bytes, bytes]] = []
    for path in folder.iterdir():
        key = path.name.encode()
        if path.name == "__pycache__" or path.suffix in {".o", ".pyc", ".so"}:
            continue
        if path.is_dir() and not path.is_symlink():
            if name := _tree(path):
                entries.append((key + b"/", b"40000 " + key + b"\0" + name))
            continue
        if path.is_symlink():
            mode, content = b"120000 ", os.readlink(path).encode()
        else:
            executable = path.stat().st_mode & 0o100
            mode, content = b"100755 " if executable else b"100644 ", path.read_bytes()
        entries.append((key, mode + key + b"\0" + _named(b"blob", content)))
    # git sorts folders as if their names ended in a slash.
    return _named(b"tree", b"".join(entry for _, entry in sorted(entries))) if entries else b""


def _named(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).digest()


def _package_revision() -> str | None:
    """The commit that the installed package was built from, where it says so."""
    info = sg._kernels.build_info()
    if revision := info.get("revision"):
        return str(revision)
    try:
        text = metadata.distribution("steadygrad").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    found = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return str(found) if found else None


def this_source(start: Path | None = None) -> Source:
    """Describe the source around `start`, by default the working directory."""
    root = checkout((start or Path.cwd()).resolve())
    if root is None:
        built_from = str(sg._kernels.build_info().get("csrc_tree") or UNKNOWN)
        return Source(_package_revision() or UNKNOWN, built_from, UNKNOWN)
    files = tree_name(root / "csrc")
    # A checkout inside somebody else's repository has no history of its own.
    top = git(root, "rev-parse", "--show-toplevel")
    revision = git(root, "rev-parse", "HEAD") if top and Path(top).resolve() == root else None
    if revision is None:
        told = os.environ.get(REVISION_VARIABLE) or _package_revision() or UNKNOWN
        return Source(told, files, UNKNOWN)
    dirty = "-dirty" if git(root, "status", "--porcelain") else ""
    committed = git(root, "rev-parse", "HEAD:csrc") == files
    return Source(revision + dirty, files, "committed" if committed else "uncommitted changes")
