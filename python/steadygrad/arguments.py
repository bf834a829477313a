"""Checks numbers that users pass, with errors that name the argument and say what was expected."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any


def converted_to_float(where: str, value: Any, expected: str, got: object) -> float:
    """Converts ``value`` to a float, or raises an error made from ``where``, ``expected`` and ``got``."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: tensors
        raise TypeError(f"{where}: expected {expected}, got {got!r}") from None
    except OverflowError:
        # The message leaves out the digits, since Python refuses to print integers of several thousand digits.
        kind = type(value).__name__
        raise ValueError(
            f"{where}: expected {expected}, got a larger {kind} than float64 holds"
        ) from None


def checked_number(
    where: str, value: Any, *, low: float = 0.0, below: float = math.inf, finite: bool = True
) -> float:
    """Converts ``value`` to a float in [low, below), or raises an error that says what was expected."""
    expected = "a finite number" if finite else "a number"
    if low != -math.inf:
        expected += f" >= {low:g}"
    if below != math.inf:
        expected += f" and < {below:g}"
    if isinstance(value, (str, bytes)):  # float() would read "1e-3"
        raise TypeError(f"{where}: expected {expected}, got {value!r}")
    number = converted_to_float(where, value, expected, value)
    if not (number >= low and (number < below or below == math.inf)) or (
        finite and math.isinf(number)
    ):
        raise ValueError(f"{where}: expected {expected}, got {value!r}")
    return number


def checked_count(where: str, value: Any, *, low: int = 0) -> int:
    """Converts ``value`` to an int of at least ``low``, or raises an error that says what was expected."""
    expected = f"{where}: expected an int >= {low}, got {value!r}"
    count = as_int(value)
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(expected)
    if count < low:
        raise ValueError(expected)
    return count


def as_float(value: Any) -> Any:
    """Converts a real number of another type, such as NumPy's, to a float; returns anything else unchanged."""
    if type(value) in (int, float) or not isinstance(value, numbers.Real):
        return value
    return float(value)


def as_int(value: Any) -> Any:
    """Converts an integer of another type, such as NumPy's, to an int; returns anything else unchanged."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value
