"""The "binary version" of CIFAR-10 (A. Krizhevsky), in a folder or an archive.

A record is a byte for the label and 3,072 for the pixels; a batch is nothing but records. The "python version" of the
same data is pickled, and is not read: a stranger's pickle can run code or crash the process.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .binary_file import DataFileError, read_binary

FOLDER = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CLASSES = 10
FEATURES = 3 * 32 * 32
# What the python version is called, to say which file is wanted in its place.
PYTHON_VERSION = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1")

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
    """Take pixels and labels out of the records of one batch.

    Args:
        content: of the file.
        name: where it is from, for messages.

    Raises:
        DataFileError: these are no whole records, or a label is too large.
    """
    record = 1 + FEATURES
    if not content or len(content) % record:
        raise DataFileError(
            f"{name}: expected whole records of {record:,} bytes, got {len(content):,} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= CLASSES:
        raise DataFileError(
            f"{name}: expected labels from 0 to {CLASSES - 1}, got one of {labels.max()}"
        )
    return np.ascontiguousarray(records[:, 1:]), labels
