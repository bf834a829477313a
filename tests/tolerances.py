"""How close results have to be: the one table that all tests read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Tolerance:
    """The bounds in ``|actual - expected| <= atol + rtol * |expected|``."""

    rtol: float
    atol: float


# For kernels against the reference, kernels against torch, and the reference against torch. Half
# precision has no entry: see assert_error_at_most_twice_torch.
TOLERANCES = {
    torch.float32: Tolerance(rtol=1e-5, atol=1e-6),
    torch.float64: Tolerance(rtol=1e-12, atol=1e-13),
}

# Batch norm in fp32: the largest error of an output with standard deviation 1, by the mean of the input.
NORMALIZED_ERROR = {0.0: 3e-6, 100.0: 1e-5, 1000.0: 1e-4}

# Batch norm's statistics of fp32 input: the mean's error relative to the deviation, the variance's to itself.
STATISTICS_ERROR = 1e-6

# What the arithmetic may add to the rounding of the result, relative to the magnitudes that are summed. Half precision
# is computed in fp32.
ARITHMETIC_ERROR = {
    torch.float32: 5e-7,
    torch.float64: 1e-14,
    torch.bfloat16: 5e-7,
    torch.float16: 5e-7,
}


def assert_close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Check values and shape to the tolerance of ``dtype``; NaN equals NaN."""
    tolerance = TOLERANCES[dtype]
    actual, expected = float64(actual), float64(expected)
    assert actual.shape == expected.shape
    with np.errstate(invalid="ignore"):
        allowed = tolerance.atol + tolerance.rtol * np.abs(expected)
        if np.isfinite(allowed).all() and (np.abs(actual - expected) <= allowed).all():
            return  # what follows takes ten times as long
    np.testing.assert_allclose(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol)


def assert_error_at_most_twice_torch(
    actual: torch.Tensor, by_torch: torch.Tensor, exact: ArrayLike
) -> None:
    """Check that the largest error against float64 is at most twice torch's.

    See _assert_error_against_torch.
    """
    _assert_error_against_torch(actual, by_torch, exact, 2)


def assert_error_at_most_torch(
    actual: torch.Tensor, by_torch: torch.Tensor, exact: ArrayLike
) -> None:
    """Check that the largest error against float64 is at most torch's.

    See _assert_error_against_torch. Near a tie either neighbour is right, so an error that fp32 arithmetic cannot
    resolve is allowed.
    """
    finite = float64(exact)[np.isfinite(float64(exact))]
    in_fp32 = ARITHMETIC_ERROR[actual.dtype] * float(np.abs(finite).max(initial=0.0))
    _assert_error_against_torch(actual, by_torch, exact, 1, in_fp32)


def _assert_error_against_torch(
    actual: torch.Tensor,
    by_torch: torch.Tensor,
    exact: ArrayLike,
    factor: float,
    arithmetic_error: float = 0.0,
) -> None:
    """Check that the largest error against float64 is at most ``factor`` times torch's.

    A result that is the exact one rounded to its dtype always passes, even if torch happens to be exact. NaN and
    infinities have to be where the exact result, rounded, has them.
    """
    assert actual.dtype == by_torch.dtype
    exact = float64(exact)
    assert actual.shape == by_torch.shape == exact.shape
    rounded = float64(torch.as_tensor(exact).to(actual.dtype))
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(float64(actual)[~finite], rounded[~finite])
    # If torch overflows and the exact result does not, torch's error is no measure.
    judged = finite & np.isfinite(float64(by_torch))
    assert np.isfinite(float64(actual)[finite]).all()
    ours = _largest_error(float64(actual)[finite], exact[finite])
    theirs = _largest_error(float64(by_torch)[judged], exact[judged])
    allowed = max(factor * theirs, _largest_error(rounded[finite], exact[finite]))
    allowed += arithmetic_error
    assert ours <= allowed, f"error {ours:.3g}, torch's {theirs:.3g}, allowed {allowed:.3g}"


def assert_rounded(
    actual: torch.Tensor, exact: ArrayLike, magnitude: ArrayLike, arithmetic: torch.dtype
) -> None:
    """Check that a result is the exact one, rounded once to its dtype, except for the error of the arithmetic.

    NaN and infinities have to be where the exact result, rounded, has them.

    Args:
        actual: The result, of any dtype.
        exact: The exact result, in float64.
        magnitude: For each element, the sum of the magnitudes of the terms that make it.
        arithmetic: The dtype of the elements, which decides the precision in which they were computed.
    """
    exact, magnitude = float64(exact), float64(magnitude)
    got = float64(actual)
    assert got.shape == exact.shape
    rounded = float64(torch.as_tensor(exact).to(actual.dtype))
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(got[~finite], rounded[~finite])
    information = torch.finfo(actual.dtype)
    # For denormals only the last bit counts, and a result at a tie may go either way.
    allowed = information.eps / 2 * np.abs(exact) + information.tiny * information.eps
    allowed = allowed + ARITHMETIC_ERROR[arithmetic] * (1 + information.eps) * magnitude
    error = np.abs(got - exact)
    wrong = finite & ~(error <= allowed)
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, error / allowed, 0)), wrong.shape)
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} elements are wrong, the worst at {worst}: "
            f"{got[worst]} for {exact[worst]}, error {error[worst]:.3g}, "
            f"allowed {allowed[worst]:.3g}"
        )


def float64(value: Any) -> NDArray[np.float64]:
    """Return a tensor of any dtype and device, or anything array-like, as a float64 array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _largest_error(values: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    return float(np.abs(values - exact).max(initial=0.0))
