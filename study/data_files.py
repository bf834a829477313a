"""Full MNIST (IDX files) and CIFAR-10 (its binary version), from a folder that the user names with ``--data DIR``.

Nothing is downloaded and nothing is unpickled: a stranger's pickle can run code.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .data import Dataset, from_pixels

Bytes = npt.NDArray[np.uint8]

_MNIST = {
    (part, content): f"{part}-{content}-idx{dimensions}-ubyte"
    for part in ("train", "t10k")
    for content, dimensions in (("images", 3), ("labels", 1))
}
_FOLDER, _ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
_BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_RECORD = 1 + 3 * 32 * 32  # a byte for the label, then the red, the green and the blue plane
# What the python version is called, to say which file is wanted in its place.
_PICKLES = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1")


class DataFileError(ValueError):
    """A data file or folder is missing, damaged or not what it should be; the message names it."""


def datasets_in(folder: Path) -> dict[str, Callable[[], Dataset]]:
    """Say which data there are in a folder, without reading them.

    Args:
        folder: holds the MNIST files, themselves or in ``MNIST/raw``, or CIFAR-10 as
            ``cifar-10-binary.tar.gz`` or in the folder ``cifar-10-batches-bin``, or both, or is
            that folder.

    Returns:
        ``"mnist"`` and ``"cifar10"``, those that are there -> what loads them.

    Raises:
        DataFileError: there is no such folder, or neither is in it, or CIFAR-10 only as pickles.
    """
    if not folder.is_dir():
        raise DataFileError(f"{folder}: no such folder")
    found: dict[str, Callable[[], Dataset]] = {}
    if any(_mnist_file(folder, name) for name in _MNIST.values()):
        found["mnist"] = lambda: mnist(folder)
    if _cifar_source(folder):
        found["cifar10"] = lambda: cifar10(folder)
    if not found:
        _refuse_pickles(folder)
        names = ", ".join(_MNIST.values())
        raise DataFileError(
            f"{folder}: expected MNIST ({names}, each also with .gz) or CIFAR-10 ({_FOLDER} or "
            f"{_ARCHIVE}), found neither"
        )
    return found


def mnist(folder: Path) -> Dataset:
    """Load MNIST from its four IDX files, in ``folder`` or in ``folder/MNIST/raw``.

    The files may be compressed by gzip, and have a dot in the place of the second hyphen
    (``train-images.idx3-ubyte``).

    Raises:
        DataFileError: a file is missing, damaged or another one, or the files do not fit together.
    """
    paths = {part: _mnist_file(folder, name) for part, name in _MNIST.items()}
    for which, path in paths.items():
        if path is None:
            file = folder / _MNIST[which]
            raise DataFileError(f"{file}: no such file, and none with .gz or in MNIST/raw")
    arrays = {p: read_idx(path, 3 if p[1] == "images" else 1) for p, path in paths.items() if path}
    sizes = {}
    for part in ("train", "t10k"):
        images, labels = arrays[part, "images"], arrays[part, "labels"]
        sizes[part] = " x ".join(map(str, images.shape[1:]))
        if len(images) != len(labels):
            raise DataFileError(
                f"{paths[part, 'labels']}: expected a label for each of the {len(images)} images, "
                f"got {len(labels)}"
            )
        if not images.size:
            got = f"{len(images)} x {sizes[part]}"
            raise DataFileError(f"{paths[part, 'images']}: expected images, got {got}")
        _check_labels(labels, str(paths[part, "labels"]))
    if sizes["train"] != sizes["t10k"]:
        raise DataFileError(
            f"{paths['t10k', 'images']}: expected images of {sizes['train']} as in the training "
            f"part, got {sizes['t10k']}"
        )
    train, test = ((arrays[p, "images"], arrays[p, "labels"]) for p in ("train", "t10k"))
    counts = f"{len(train[1]):,} digits to train on and {len(test[1]):,} to test"
    return _dataset(folder, f"MNIST ({sizes['train']}), {counts}", train, test, 1)


def cifar10(folder: Path) -> Dataset:
    """Load CIFAR-10 from its "binary version": five training batches and one to test on.

    Args:
        folder: holds ``cifar-10-batches-bin`` or ``cifar-10-binary.tar.gz``, or is the former.
            Where there are both, the folder is read.

    Raises:
        DataFileError: a file is missing, damaged or another one.
    """
    source = _cifar_source(folder)
    if source is None:
        _refuse_pickles(folder)
        raise DataFileError(f"{folder}: expected {_FOLDER} or {_ARCHIVE}, found neither")
    contents = _in_folder(source) if source.is_dir() else _in_archive(source)
    *train, test = (read_cifar(contents[name], f"{source / name}") for name in _BATCHES)
    pixels, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    counts = f"{len(labels):,} images to train on and {len(test[1]):,} to test"
    return _dataset(source, f"CIFAR-10 (32 x 32, 3 colours), {counts}", (pixels, labels), test, 3)


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Read an IDX file (Y. LeCun) of unsigned bytes, plain or compressed by gzip.

    It is a magic number (two zeros, the type 8, the number of dimensions), the dimensions as
    big-endian 32-bit numbers, and the elements, the last index fastest.
    """
    content = _read(path)
    if len(content) < 4:
        raise DataFileError(f"{path}: expected an IDX file, got a file of {len(content)} bytes")
    magic, expected = int.from_bytes(content[:4], "big"), 8 << 8 | dimensions
    if magic != expected:
        raise DataFileError(
            f"{path}: expected the magic number {expected:#010x} (IDX, unsigned bytes, "
            f"dimensions: {dimensions}), got {magic:#010x}"
        )
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise DataFileError(
            f"{path}: truncated: expected a header of {header} bytes, got {len(content)}"
        )
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    elements, found = int(np.prod(shape, dtype=object)), len(content) - header
    if found != elements:
        raise DataFileError(
            f"{path}: {'truncated' if found < elements else 'too long'}: its header says "
            f"{' x '.join(map(str, shape))}, expected {elements} bytes after it, got {found}"
        )
    array: Bytes = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    return array


def read_cifar(content: bytes, name: str) -> tuple[Bytes, Bytes]:
    """Return pixels, ``(images, 3072)``, and labels, ``(images,)``, of the records of a batch."""
    if not content or len(content) % _RECORD:
        raise DataFileError(
            f"{name}: expected whole records of {_RECORD:,} bytes, got {len(content):,} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    _check_labels(records[:, 0], name)
    return records[:, 1:], records[:, 0]


def _read(path: Path) -> bytes:
    """Read a file, and decompress it if it begins as gzip does, whatever its name."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"{path}: expected a whole gzip file, got: {error}") from error


def _mnist_file(folder: Path, name: str) -> Path | None:
    """Return the first file there is under the names that are in use, None if there is none."""
    names = [each + end for each in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    paths = (place / each for place in (folder, folder / "MNIST" / "raw") for each in names)
    return next((path for path in paths if path.is_file()), None)


def _cifar_source(folder: Path) -> Path | None:
    if (folder / _BATCHES[0]).is_file():
        return folder
    return next((folder / name for name in (_FOLDER, _ARCHIVE) if (folder / name).exists()), None)


def _in_folder(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in _BATCHES:
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise DataFileError(f"{folder / name}: no such file; expected {', '.join(_BATCHES)}")
        found[name] = _read(path)
    return found


def _in_archive(path: Path) -> dict[str, bytes]:
    """Read the batches from the archive as it is distributed, without unpacking it to disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name in _BATCHES and (file := archive.extractfile(member)):
                    found.setdefault(name, file.read())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataFileError(f"{path}: expected a whole tar archive, got: {error}") from error
    if missing := [name for name in _BATCHES if name not in found]:
        raise DataFileError(
            f"{path}: expected {', '.join(_BATCHES)}; {', '.join(missing)} not found"
        )
    return found


def _refuse_pickles(folder: Path) -> None:
    for name in _PICKLES:
        if (folder / name).exists():
            raise DataFileError(
                f"{folder / name}: expected the binary version of CIFAR-10, {_ARCHIVE}, from the same "
                "page; the python version consists of pickles, which can run code as they are read"
            )


def _check_labels(labels: Bytes, name: str) -> None:
    if labels.max() > 9:
        raise DataFileError(f"{name}: expected labels from 0 to 9, got one of {labels.max()}")


def _dataset(source: Path, name: str, train: Any, test: Any, channels: int) -> Dataset:
    try:
        return from_pixels(name, train, test, classes=10, channels=channels)
    except ValueError as error:
        raise DataFileError(f"{source}: {error}") from error
