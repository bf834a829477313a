"""Tests reading MNIST and CIFAR-10 from the user's files, and the messages about bad files."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from study.data import StudyError, cifar10, datasets_in, mnist

TRAIN, TEST = 30, 20
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def digits() -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return the contents of the four MNIST files: images of 4 x 3 pixels, and labels."""
    generator = np.random.default_rng(7)
    return {
        NAMES[0]: generator.integers(0, 256, (TRAIN, 4, 3), dtype=np.uint8),
        NAMES[1]: np.arange(TRAIN, dtype=np.uint8) % 10,
        NAMES[2]: generator.integers(0, 256, (TEST, 4, 3), dtype=np.uint8),
        NAMES[3]: np.arange(TEST, dtype=np.uint8) % 10,
    }


@pytest.fixture
def mnist_folder(tmp_path: Path, digits: dict[str, Any]) -> Path:
    for name, array in digits.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def a_batch(images: int, first: int) -> dict[str, Any]:
    pixels = np.arange(images * 3072).reshape(images, 3072) + 31 * first
    return {
        "data": (pixels % 251).astype(np.uint8),
        "labels": [(first + i) % 10 for i in range(images)],
    }


BATCHES = {f"data_batch_{n}.bin": a_batch(n + 1, 10 * n) for n in range(1, 6)}
BATCHES["test_batch.bin"] = a_batch(10, 0)


def records(batch: dict[str, Any]) -> bytes:
    """Return a batch in the binary version: a label and 3,072 pixels for each image."""
    labels = np.array(batch["labels"], dtype=np.uint8)[:, None]
    return np.concatenate([labels, batch["data"]], axis=1).tobytes()


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, batch in BATCHES.items():
        (folder / name).write_bytes(records(batch))
    return tmp_path


def cifar_archive(folder: Path, names: tuple[str, ...] = tuple(BATCHES)) -> Path:
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            content = records(BATCHES[name])
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def refused(load: Callable[[Path], object], folder: Path, *words: str) -> None:
    with pytest.raises(StudyError) as info:
        load(folder)
    for word in words:
        assert word in str(info.value)


# --- MNIST ---


def test_mnist_is_the_files_normalised_by_the_training_part(
    mnist_folder: Path, digits: dict[str, Any]
) -> None:
    data = mnist(mnist_folder)
    train = torch.from_numpy(digits[NAMES[0]]).double().view(TRAIN, 12) / 255
    test = torch.from_numpy(digits[NAMES[2]]).double().view(TEST, 12) / 255
    expected = ((test - train.mean()) / train.std()).float()
    torch.testing.assert_close(data.test_inputs, expected, rtol=1e-5, atol=1e-5)
    assert data.train_inputs.shape == (TRAIN, 12)
    assert data.train_inputs.dtype == torch.float32
    assert abs(data.train_inputs.mean().item()) < 1e-5
    assert abs(data.train_inputs.std().item() - 1) < 1e-5
    assert data.train_labels.tolist() == digits[NAMES[1]].tolist()
    assert data.test_labels.tolist() == digits[NAMES[3]].tolist()
    assert data.test_labels.dtype == torch.int64
    assert data.classes == 10
    assert data.name == "MNIST (4 x 3), 30 digits to train on and 20 to test"


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_mnist_under_every_name(
    tmp_path: Path, digits: dict[str, Any], dot: bool, compressed: bool, place: str
) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in digits.items():
        name = name.replace("-idx", ".idx") if dot else name
        content = idx(array)
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)
    assert list(datasets_in(tmp_path)) == ["mnist"]
    data = datasets_in(tmp_path)["mnist"]()
    assert data.train_labels.tolist() == digits[NAMES[1]].tolist()


def test_compression_is_seen_in_the_content(mnist_folder: Path, digits: dict[str, Any]) -> None:
    path = mnist_folder / NAMES[0]
    expected = mnist(mnist_folder).train_inputs
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert torch.equal(mnist(mnist_folder).train_inputs, expected)


@pytest.mark.parametrize("name", NAMES)
def test_each_missing_mnist_file_is_named(mnist_folder: Path, name: str) -> None:
    (mnist_folder / name).unlink()
    assert "mnist" in datasets_in(mnist_folder)
    refused(mnist, mnist_folder, str(mnist_folder / name), "No such file")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_magic_number(mnist_folder: Path, name: str) -> None:
    path = mnist_folder / name
    path.write_bytes(b"\0\0\x0d" + path.read_bytes()[3:])
    expected = "00000803" if "images" in name else "00000801"
    found = expected.replace("08", "0d", 1)
    refused(mnist, mnist_folder, str(path), f"begins with {expected}", f"got {found}")


def test_labels_in_the_place_of_images(mnist_folder: Path) -> None:
    (mnist_folder / NAMES[0]).write_bytes((mnist_folder / NAMES[1]).read_bytes())
    refused(mnist, mnist_folder, NAMES[0], "00000803", "got 00000801")


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (0, ("expected an IDX file", "got nothing and 0 bytes")),
        (3, ("expected an IDX file", "and 3 bytes")),
        (9, ("expected an IDX file", "header of 16 bytes", "and 9 bytes")),
        (-1, ("truncated", "expected 30 x 4 x 3 bytes", "got 359")),
    ],
)
def test_truncated_mnist_file(mnist_folder: Path, kept: int, words: tuple[str, ...]) -> None:
    path = mnist_folder / NAMES[0]
    path.write_bytes(path.read_bytes()[:kept])
    refused(mnist, mnist_folder, str(path), *words)


def test_mnist_file_that_is_too_long(mnist_folder: Path) -> None:
    path = mnist_folder / NAMES[3]
    path.write_bytes(path.read_bytes() + b"\0")
    refused(mnist, mnist_folder, str(path), "too long", "expected 20 bytes", "got 21")


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_gzip_file(mnist_folder: Path, damage: str) -> None:
    path = mnist_folder / NAMES[0]
    content = bytearray(gzip.compress(path.read_bytes()))
    if damage == "cut":
        del content[-20:]
    else:
        content[-5] ^= 0xFF  # a byte of the checksum
    path.write_bytes(bytes(content))
    refused(mnist, mnist_folder, str(path), "whole file")


def test_sizes_that_disagree(mnist_folder: Path, digits: dict[str, Any]) -> None:
    labels = mnist_folder / NAMES[1]
    labels.write_bytes(idx(digits[NAMES[1]][:-1]))
    refused(mnist, mnist_folder, str(labels), "each of the 30 images", "got 29")
    labels.write_bytes(idx(digits[NAMES[1]]))
    images = mnist_folder / NAMES[2]
    images.write_bytes(idx(digits[NAMES[2]].reshape(TEST, 3, 4)))
    refused(mnist, mnist_folder, str(images), "images of 4 x 3", "got 20 x 3 x 4")


def test_mnist_files_without_meaning(mnist_folder: Path, digits: dict[str, Any]) -> None:
    labels = mnist_folder / NAMES[3]
    labels.write_bytes(idx(digits[NAMES[3]] + np.uint8(1)))
    refused(mnist, mnist_folder, str(labels), "labels from 0 to 9", "got one of 10")
    labels.write_bytes(idx(digits[NAMES[3]]))
    images = mnist_folder / NAMES[0]
    images.write_bytes(idx(np.zeros_like(digits[NAMES[0]])))
    refused(mnist, mnist_folder, str(mnist_folder), "are all 0")
    images.write_bytes(idx(digits[NAMES[0]][:0]))
    (mnist_folder / NAMES[1]).write_bytes(idx(digits[NAMES[1]][:0]))
    refused(mnist, mnist_folder, str(images), "expected images of 4 x 3, got 0 x 4 x 3")


# --- CIFAR-10 ---


def test_cifar_is_the_batches_in_order_normalised_by_colour(cifar_folder: Path) -> None:
    data = cifar10(cifar_folder)
    train = [BATCHES[f"data_batch_{n}.bin"] for n in range(1, 6)]
    pixels = torch.from_numpy(np.concatenate([b["data"] for b in train])).double().view(20, 3, -1)
    centred = pixels / 255 - (pixels / 255).mean(dim=(0, 2), keepdim=True)
    expected = centred / pixels.div(255).transpose(0, 1).reshape(3, -1).std(dim=1).view(3, 1)
    torch.testing.assert_close(
        data.train_inputs, expected.view(20, 3072).float(), rtol=1e-5, atol=1e-5
    )
    assert data.train_labels.tolist() == [label for b in train for label in b["labels"]]
    assert data.test_labels.tolist() == list(range(10))
    assert data.test_inputs.shape == (10, 3072)
    assert data.classes == 10
    assert data.name == "CIFAR-10 (32 x 32, 3 colours), 20 images to train on and 10 to test"


def test_cifar_from_the_archive(
    cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = cifar10(cifar_folder)
    elsewhere = tmp_path_factory.mktemp("archive")
    cifar_archive(elsewhere)
    assert list(datasets_in(elsewhere)) == ["cifar10"]
    assert torch.equal(datasets_in(elsewhere)["cifar10"]().train_inputs, expected.train_inputs)


def test_folder_of_the_batches_may_be_named_itself(cifar_folder: Path) -> None:
    inner = cifar_folder / "cifar-10-batches-bin"
    assert list(datasets_in(inner)) == ["cifar10"]
    assert len(cifar10(inner).train_labels) == 20


WHOLE = records(BATCHES["test_batch.bin"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("whole records of 3,073 bytes", "got 0 bytes")),
        (WHOLE[:-100], ("whole records of 3,073 bytes", "got 30,630 bytes")),
        (WHOLE + b"\0", ("whole records of 3,073 bytes", "got 30,731 bytes")),
        (b"\x0a" + WHOLE[1:], ("labels from 0 to 9", "got one of 10")),
    ],
)
def test_bad_cifar_batch(cifar_folder: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = cifar_folder / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(content)
    refused(cifar10, cifar_folder, str(path), *words)


@pytest.mark.parametrize(
    "name", ["cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_1", "data_batch_1"]
)
def test_pickles_are_not_opened_and_the_file_that_is_wanted_is_named(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"cbuiltins\neval\n(V1/0\ntR.")  # this pickle raises when it is loaded
    found = tmp_path / Path(name).parts[0]
    for load in (datasets_in, cifar10):
        refused(load, tmp_path, f"{found}: expected the binary version", "cifar-10-binary.tar.gz")


def test_missing_cifar_batch(cifar_folder: Path, tmp_path_factory: Any) -> None:
    path = cifar_folder / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.unlink()
    refused(cifar10, cifar_folder, str(path), "No such file")
    elsewhere = tmp_path_factory.mktemp("archive")
    archive = cifar_archive(elsewhere, ("data_batch_1.bin", "test_batch.bin"))
    refused(cifar10, elsewhere, str(archive), "data_batch_2.bin, data_batch_3.bin", "not found")


@pytest.mark.parametrize("kept", [0, 100, -50])
def test_damaged_cifar_archive(tmp_path: Path, kept: int) -> None:
    path = cifar_archive(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    refused(cifar10, tmp_path, str(path), "expected a whole file")


# --- the folder ---


def test_folder_with_both(mnist_folder: Path, cifar_folder: Path) -> None:
    assert mnist_folder == cifar_folder
    assert list(datasets_in(mnist_folder)) == ["mnist", "cifar10"]


def test_folder_that_is_missing_or_holds_neither(tmp_path: Path) -> None:
    refused(datasets_in, tmp_path / "nowhere", "nowhere: no such folder")
    refused(
        datasets_in, tmp_path, str(tmp_path), "train-images-idx3-ubyte", "cifar-10-binary.tar.gz"
    )
    refused(cifar10, tmp_path, str(tmp_path), "cifar-10-batches-bin", "found nothing")
    file = tmp_path / "file"
    file.touch()
    refused(datasets_in, file, "no such folder")
