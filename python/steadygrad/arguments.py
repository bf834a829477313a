"""Checks of numbers that users give, with messages that say where and what was expected."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any


def converted_to_float(where: str, value: Any, expected: str, got: object) -> float:
    """``value`` as a float, or an error that says where, what was expected and, by ``got``, what came."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: tensors that hold no number
        raise TypeError(f"{where}: expected {expected}, got {got!r}") from None
    except OverflowError:
        # Without its digits: Python refuses to print some thousands of them.
        kind = type(value).__name__
        raise ValueError(
            f"{where}: expected {expected}, got a larger {kind} than float64 holds"
        ) from None


def checked_number(
    where: str, value: Any, *, low: float = 0.0, below: float = math.inf, finite: bool = True
) -> float:
    """``value`` as a float in [low, below), or an error that says where and what was expected."""
    expected = "a finite number" if finite else "a number"
    if low != -math.inf:
        expected += f" >= {low:g}"
    if below != math.inf:
        expected += f" and < {below:g}"
    number = converted_to_float(where, value, expected, value)
    if not (number >= low and (number < below or below == math.inf)) or (
        finite and math.isinf(number)
    ):
        raise ValueError(f"{where}: expected {expected}, got {value!r}")
    return number


def checked_count(where: str, value: Any, *, low: int = 0) -> int:
    """``value`` as an int of at least ``low``, or an error that says where and what was expected."""
    expected = f"{where}: expected an int >= {low}, got {value!r}"
    count = as_int(value)
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(expected)
    if count < low:
        raise ValueError(expected)
    return count


def as_float(value: Any) -> Any:
    """``value`` as Python's float where it is a real number of another type, such as NumPy's; else as it is."""
    if type(value) in (int, float) or not isinstance(value, numbers.Real):
        return value
    return float(value)


def as_int(value: Any) -> Any:
    """``value`` as Python's int where it is an integer of another type, such as NumPy's; else as it is."""
    if isinstance(value, bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value
