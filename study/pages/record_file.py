"""Reads the JSON files that pages are made of."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any


def read_record(path: Path, kind: str, schemas: Container[int], key: str) -> dict[str, Any]:
    """Read a JSON object that says which schema it has.

    Args:
        path: of the file.
        kind: what it has to be, for messages, such as ``"a study of schema 2"``.
        schemas: the schemas that will do.
        key: another key that it must have.

    Raises:
        ValueError: the file cannot be read, or is something else; the message names it.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema not in schemas or key not in record:
        raise ValueError(f"{path}: expected {kind}, got {schema!r}")
    return dict(record)
