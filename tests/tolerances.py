"""How close results must be: the one table that all tests read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Tolerance:
    """Bounds of ``|actual - expected| <= atol + rtol * |expected|``."""

    rtol: float
    atol: float


# Kernels against the reference, kernels against torch, and the reference against torch. The half
# precisions have no entry: see assert_error_at_most_twice_torch.
TOLERANCES = {
    torch.float32: Tolerance(rtol=1e-5, atol=1e-6),
    torch.float64: Tolerance(rtol=1e-12, atol=1e-13),
}


def assert_close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Check values and shape to the tolerance of ``dtype``; NaN equals NaN."""
    tolerance = TOLERANCES[dtype]
    actual, expected = float64(actual), float64(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol)


def assert_error_at_most_twice_torch(
    actual: torch.Tensor, by_torch: torch.Tensor, exact: ArrayLike
) -> None:
    """Check that the largest error against float64 is at most twice that of torch.

    A result that is the exact one rounded to its dtype always passes, also where torch happens to
    be exact. NaN and infinities must stand where the exact result, rounded, has them.
    """
    assert actual.dtype == by_torch.dtype
    exact = float64(exact)
    assert actual.shape == by_torch.shape == exact.shape
    rounded = float64(torch.as_tensor(exact).to(actual.dtype))
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(float64(actual)[~finite], rounded[~finite])
    # Where torch overflows and the exact result does not, torch's error is no measure.
    judged = finite & np.isfinite(float64(by_torch))
    assert np.isfinite(float64(actual)[finite]).all()
    ours = _largest_error(float64(actual)[finite], exact[finite])
    theirs = _largest_error(float64(by_torch)[judged], exact[judged])
    allowed = max(2 * theirs, _largest_error(rounded[finite], exact[finite]))
    assert ours <= allowed, f"error {ours:.3g}, torch's {theirs:.3g}, allowed {allowed:.3g}"


def float64(value: Any) -> NDArray[np.float64]:
    """Return a tensor of any dtype and device, or anything array-like, as a float64 array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _largest_error(values: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    return float(np.abs(values - exact).max(initial=0.0))
