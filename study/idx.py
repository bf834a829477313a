"""The IDX format of the MNIST files (Y. LeCun, C. Cortes, C. Burges).

A file is a magic number of four bytes (two zeros, the type of the elements, the number of
dimensions), the dimensions as big-endian 32-bit numbers, and the elements, the last index fastest.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .binary_file import DataFileError, read_binary

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, plain or compressed by gzip.

    Args:
        path: of the file.
        dimensions: how many it must have: 3 for images, 1 for labels.

    Returns:
        uint8, in the shape that the file gives; not writable.

    Raises:
        DataFileError: the file cannot be read, has another magic number, or is not as long as its
            header says.
    """
    content = read_binary(path)
    expected = _UNSIGNED_BYTE << 8 | dimensions
    header = 4 * (1 + dimensions)
    if len(content) < 4:
        raise DataFileError(
            f"{path}: expected an IDX file with the magic number {expected:#010x}, "
            f"got a file of {len(content)} bytes"
        )
    (magic,) = struct.unpack(">I", content[:4])
    if magic != expected:
        raise DataFileError(
            f"{path}: expected the magic number {expected:#010x} (IDX, unsigned bytes, "
            f"dimensions: {dimensions}), got {magic:#010x}"
        )
    if len(content) < header:
        raise DataFileError(
            f"{path}: truncated: expected a header of {header} bytes, got {len(content)}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    elements, found = math.prod(shape), len(content) - header
    if found != elements:
        size = " x ".join(map(str, shape))
        verdict = "truncated" if found < elements else "too long"
        raise DataFileError(
            f"{path}: {verdict}: its header says {size}, expected {elements} bytes after it, "
            f"got {found}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
