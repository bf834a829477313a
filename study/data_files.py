"""Full MNIST and CIFAR-10, from files in a folder that the user names with ``--data DIR``.

Nothing is downloaded. :mod:`study.idx` and :mod:`study.cifar_batches` read
the formats.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import cifar_batches
from .binary_file import DataFileError
from .data import Dataset, from_pixels
from .idx import read_idx

__all__ = ["DataFileError", "cifar10", "datasets_in", "mnist"]

_CLASSES = 10
_MNIST_PARTS = (
    ("train", "images", 3),
    ("train", "labels", 1),
    ("t10k", "images", 3),
    ("t10k", "labels", 1),
)


def datasets_in(folder: Path) -> dict[str, Callable[[], Dataset]]:
    """Say which data there are in a folder, without reading them.

    Args:
        folder: holds the MNIST files, themselves or in ``MNIST/raw``, or CIFAR-10 as
            ``cifar-10-binary.tar.gz`` or in the folder ``cifar-10-batches-bin``, or both, or is
            that folder.

    Returns:
        ``"mnist"`` and ``"cifar10"``, those that are there -> what loads them: :func:`mnist` or
        :func:`cifar10`.

    Raises:
        DataFileError: there is no such folder, or neither is in it, or CIFAR-10 only as pickles.
    """
    if not folder.is_dir():
        raise DataFileError(f"{folder}: no such folder")
    found: dict[str, Callable[[], Dataset]] = {}
    if any(_mnist_file(folder, *part) for part in _MNIST_PARTS):
        found["mnist"] = lambda: mnist(folder)
    if _cifar_source(folder):
        found["cifar10"] = lambda: cifar10(folder)
    if not found:
        _refuse_pickles(folder)
        raise DataFileError(
            f"{folder}: expected MNIST (train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, each also with .gz) or CIFAR-10 "
            f"({cifar_batches.FOLDER} or {cifar_batches.ARCHIVE}), found neither"
        )
    return found


def mnist(folder: Path) -> Dataset:
    """Load MNIST from its four IDX files, in ``folder`` or in ``folder/MNIST/raw``.

    The files may be compressed by gzip, and have a dot in the place of the second hyphen
    (``train-images.idx3-ubyte``). Pixels are shifted and scaled by the mean and standard deviation
    of the training pixels.

    Raises:
        DataFileError: a file is missing, damaged or another one, or the files do not fit together.
    """
    paths = {part[:2]: _required_mnist_file(folder, *part) for part in _MNIST_PARTS}
    arrays = {part[:2]: read_idx(paths[part[:2]], part[2]) for part in _MNIST_PARTS}
    for part in ("train", "t10k"):
        images, labels = arrays[part, "images"], arrays[part, "labels"]
        if len(images) != len(labels):
            raise DataFileError(
                f"{paths[part, 'labels']}: expected a label for each of the {len(images)} images "
                f"of {paths[part, 'images'].name}, got {len(labels)}"
            )
        if not images.size:
            size = " x ".join(map(str, images.shape))
            raise DataFileError(f"{paths[part, 'images']}: expected images, got {size}")
        if labels.max() >= _CLASSES:
            raise DataFileError(
                f"{paths[part, 'labels']}: expected labels from 0 to {_CLASSES - 1}, "
                f"got one of {labels.max()}"
            )
    train, test = arrays["train", "images"], arrays["t10k", "images"]
    if train.shape[1:] != test.shape[1:]:
        raise DataFileError(
            f"{paths['t10k', 'images']}: expected images of {_size(train)} as in "
            f"{paths['train', 'images'].name}, got {_size(test)}"
        )
    return _dataset(
        folder,
        name=f"MNIST ({_size(train)}), {len(train):,} digits to train on and {len(test):,} to test",
        train_pixels=train.reshape(len(train), -1),
        train_labels=arrays["train", "labels"].astype(np.int64),
        test_pixels=test.reshape(len(test), -1),
        test_labels=arrays["t10k", "labels"].astype(np.int64),
        classes=_CLASSES,
        channels=1,
    )


def cifar10(folder: Path) -> Dataset:
    """Load CIFAR-10 from its "binary version": five training batches and one to test on.

    Pixels are shifted and scaled by the mean and standard deviation of the training pixels, for
    each colour. An example is the red, then the green, then the blue plane of 32 x 32 pixels.

    Args:
        folder: holds ``cifar-10-batches-bin`` or ``cifar-10-binary.tar.gz``, or is the former.
            Where there are both, the folder is read.

    Raises:
        DataFileError: a file is missing, damaged or another one.
    """
    source = _cifar_source(folder)
    if source is None:
        _refuse_pickles(folder)
        raise DataFileError(
            f"{folder}: expected {cifar_batches.FOLDER} or {cifar_batches.ARCHIVE}, found neither"
        )
    read = cifar_batches.read_folder if source.is_dir() else cifar_batches.read_archive
    batches = read(source)
    test_pixels, test_labels = batches.pop(cifar_batches.BATCHES[-1])
    pixels = np.concatenate([pixels for pixels, _ in batches.values()])
    counts = f"{len(pixels):,} images to train on and {len(test_pixels):,} to test"
    return _dataset(
        source,
        name=f"CIFAR-10 (32 x 32, 3 colours), {counts}",
        train_pixels=pixels,
        train_labels=np.concatenate([labels for _, labels in batches.values()]),
        test_pixels=test_pixels,
        test_labels=test_labels,
        classes=cifar_batches.CLASSES,
        channels=3,
    )


def _mnist_file(folder: Path, part: str, content: str, dimensions: int) -> Path | None:
    """Return the first file there is under the names that are in use, None if there is none."""
    names = [f"{part}-{content}{mark}idx{dimensions}-ubyte" for mark in "-."]
    places = (folder, folder / "MNIST" / "raw")
    paths = (place / f"{name}{end}" for place in places for name in names for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _required_mnist_file(folder: Path, part: str, content: str, dimensions: int) -> Path:
    path = _mnist_file(folder, part, content, dimensions)
    if path is None:
        name = f"{part}-{content}-idx{dimensions}-ubyte"
        raise DataFileError(f"{folder / name}: no such file, and none with .gz or in MNIST/raw")
    return path


def _cifar_source(folder: Path) -> Path | None:
    candidates = (folder / cifar_batches.FOLDER, folder / cifar_batches.ARCHIVE)
    if (folder / cifar_batches.BATCHES[0]).is_file():
        return folder
    return next((path for path in candidates if path.exists()), None)


def _refuse_pickles(folder: Path) -> None:
    for name in cifar_batches.PYTHON_VERSION:
        if (folder / name).exists():
            raise DataFileError(
                f"{folder / name}: expected the binary version of CIFAR-10, {cifar_batches.ARCHIVE}, from the same "
                "page; the python version consists of pickles, which can run code as they are read"
            )


def _dataset(source: Path, **parts: Any) -> Dataset:
    try:
        return from_pixels(**parts)
    except ValueError as error:
        raise DataFileError(f"{source}: {error}") from error


def _size(images: npt.NDArray[np.uint8]) -> str:
    return " x ".join(map(str, images.shape[1:]))
