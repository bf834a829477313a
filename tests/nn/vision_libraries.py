"""timm and torchvision, which ``make test`` installs beside the environment and not in it.

Other libraries look for torchvision and import it if it is there, and the registry's builds of it want CUDA.
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
    """These modules, of timm and torchvision, which are forgotten afterwards; skips the test where they are not."""
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
            # Its compiled part wants CUDA. Its Python, which is all that is used here, wants these names to exist.
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
