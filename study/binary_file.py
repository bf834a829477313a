"""Reads data files whole, plain or compressed by gzip."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

_GZIP_SIGNATURE = b"\x1f\x8b"


class DataFileError(ValueError):
    """A data file or folder is missing, damaged or not what it should be; the message names it."""


def read_binary(path: Path) -> bytes:
    """Read a file, and decompress it if it begins as gzip does, whatever its name.

    Args:
        path: of the file.

    Raises:
        DataFileError: the file cannot be read, or its compressed data are damaged or cut short.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror}") from error
    if not content.startswith(_GZIP_SIGNATURE):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"{path}: expected a whole gzip file, got: {error}") from error
