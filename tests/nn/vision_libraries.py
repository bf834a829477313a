"""timm and torchvision, which ``make test`` installs into a folder of their own.

They are not in the environment itself, because other libraries import torchvision if it is there, and the registry's
builds of it need CUDA.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

BESIDE = Path(sys.prefix) / "vision"


@contextmanager
def vision(*modules: str) -> Iterator[list[ModuleType]]:
    """Yield these modules of timm and torchvision and unload them afterwards; skip the test if they are missing."""
    with pytest.MonkeyPatch.context() as patch:
        if BESIDE.is_dir():
            patch.syspath_prepend(str(BESIDE))
        for package in {name.partition(".")[0] for name in modules} | {"torchvision"}:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
        operators = None
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            # Its compiled part needs CUDA. Its Python, which is all that is used here, only needs these names to exist.
            _forget("torchvision")
            operators = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                operators.define(
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        try:
            yield [importlib.import_module(name) for name in modules]
        finally:
            _forget("timm", "torchvision")
            del operators


def _forget(*packages: str) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]
