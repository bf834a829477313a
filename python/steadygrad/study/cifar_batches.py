"""The "python version" of CIFAR-10 (A. Krizhevsky): pickled dictionaries, in a folder or an archive.

A pickle can run any code while it is read. These are read by an unpickler that knows NumPy arrays
of plain numbers, bytes, text, numbers, lists and dictionaries, and refuses everything else.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .binary_file import DataFileError, read_binary

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
CLASSES = 10
FEATURES = 3 * 32 * 32

Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def read_folder(folder: Path) -> dict[str, Batch]:
    """Read the batches from files in ``folder``, each plain or compressed by gzip.

    Returns:
        Name of the batch -> pixels, uint8 ``(images, 3072)``, red plane first, and labels, int64
        ``(images,)``.

    Raises:
        DataFileError: a file is missing or is no batch of CIFAR-10.
    """
    found = {}
    for name in BATCHES:
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise DataFileError(f"{folder / name}: no such file; expected {', '.join(BATCHES)}")
        found[name] = parse_batch(read_binary(path), str(path))
    return found


def read_archive(path: Path) -> dict[str, Batch]:
    """Read the batches from the archive as it is distributed, without unpacking it to disk.

    Returns:
        As :func:`read_folder`.

    Raises:
        DataFileError: the archive is damaged, or a batch is missing or is none of CIFAR-10.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                file = archive.extractfile(member) if member.isreg() else None
                if name in BATCHES and name not in contents and file is not None:
                    contents[name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataFileError(f"{path}: expected a whole tar archive, got: {error}") from error
    if missing := [name for name in BATCHES if name not in contents]:
        raise DataFileError(
            f"{path}: expected the files {', '.join(BATCHES)}, {', '.join(missing)} not found"
        )
    return {name: parse_batch(contents[name], f"{path}: {name}") for name in BATCHES}


def parse_batch(content: bytes, name: str) -> Batch:
    """Take pixels and labels out of one pickled batch.

    Args:
        content: the pickle.
        name: where it is from, for messages.

    Raises:
        DataFileError: it is damaged, holds what a batch does not, or sizes disagree.
    """
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except DataFileError as error:
        raise DataFileError(f"{name}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error) or type(error).__name__
        raise DataFileError(f"{name}: expected a whole pickle, got: {reason}") from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise DataFileError(
            f"{name}: expected a dictionary with the keys data and labels, got {_kind(batch)}"
        )
    pixels, labels = batch[b"data"], batch[b"labels"]
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (FEATURES,)
        or not len(pixels)
    ):
        raise DataFileError(
            f"{name}: expected data to be uint8 of shape (images, {FEATURES}), got {_kind(pixels)}"
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataFileError(f"{name}: expected labels to be a list of numbers, got {_kind(labels)}")
    if len(labels) != len(pixels):
        raise DataFileError(
            f"{name}: expected as many labels as images, got {len(labels)} labels and "
            f"{len(pixels)} images"
        )
    if outside := [label for label in labels if not 0 <= label < CLASSES]:
        raise DataFileError(
            f"{name}: expected labels from 0 to {CLASSES - 1}, got one of {outside[0]}"
        )
    return np.ascontiguousarray(pixels), np.array(labels, dtype=np.int64)


def _latin1(text: str, encoding: str) -> bytes:
    """Do what Python 3 asks ``_codecs.encode`` for when it stores bytes in an old protocol."""
    if encoding != "latin1":
        raise DataFileError(f"expected the encoding latin1, got {encoding!r}")
    return text.encode("latin1")


def _plain_dtype(*arguments: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(*arguments)
    if dtype.kind not in "biuf":
        raise DataFileError(f"expected arrays of plain numbers, got dtype {dtype}")
    return dtype


# What NumPy itself names in the pickle of an array: by __reduce__ up to protocol 4, and from 5 on.
_OF_ARRAYS: Mapping[str, Callable[..., Any]] = {
    "_reconstruct": np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    "_frombuffer": np.empty(1).__reduce_ex__(5)[0],  # type: ignore[dict-item]
}
_ARRAY_MODULES = {
    f"numpy.{core}.{module}" for core in ("core", "_core") for module in ("multiarray", "numeric")
}


class _Unpickler(pickle.Unpickler):
    """Knows the few functions and classes that a batch needs."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle asks for by name, or refuse."""
        if module in _ARRAY_MODULES and name in _OF_ARRAYS:
            return _OF_ARRAYS[name]
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _plain_dtype,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) in known:
            return known[module, name]
        raise DataFileError(f"expected NumPy arrays, bytes and dictionaries, got {module}.{name}")


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    if isinstance(value, dict):
        keys = (key.decode("latin1") if isinstance(key, bytes) else str(key) for key in value)
        return f"a dictionary with the keys {', '.join(keys) or '(none)'}"
    return f"a {type(value).__name__}"
