"""Runs as JSON values: non-finite numbers, which JSON has not, are strings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .training import Curve, Evaluations, Run


def encode(value: Any) -> Any:
    """Return ``value`` with dataclasses as objects, tuples as lists and non-finite numbers as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode_run(stored: dict[str, Any]) -> Run:
    """Return the run that :func:`encode` made an object of.

    Raises:
        KeyError: a field is missing.
    """
    values = {item.name: stored[item.name] for item in dataclasses.fields(Run)}
    for name, value in values.items():
        if name not in ("problem", "arm", "exploded_parameter"):
            values[name] = _decode(value)
    if values["curve"] is not None:
        values["curve"] = Curve(**values["curve"])
    values["evaluations"] = Evaluations(**values["evaluations"])
    return Run(**values)


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    return float(value) if isinstance(value, str) else value
