from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steadygrad import reference
from tests.tolerances import assert_close

INF = math.inf
NORM_TYPES = [2.0, 1.0, 0.5, 1.5, 3.0, 0.0, INF, -INF, -1.0, -2.0]

finite_elements = st.floats(allow_nan=False, allow_infinity=False, width=64)
# Squares and cubes of these numbers stay within float64, so torch can be compared with.
ordinary_elements = st.one_of(
    st.just(0.0), st.floats(1e-30, 1e30), st.floats(1e-30, 1e30).map(lambda x: -x)
)
lists_of_arrays = st.lists(st.lists(ordinary_elements, min_size=1, max_size=9), max_size=5)


def test_reference_does_not_import_torch() -> None:
    package = Path(reference.__file__).parent
    # The module is loaded by its path, since the parent package does import torch.
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "reference", {str(package / "__init__.py")!r}, submodule_search_locations=[{str(package)!r}]
)
module = importlib.util.module_from_spec(spec)
sys.modules["reference"] = module
spec.loader.exec_module(module)
assert module.norm.total_norm([[3.0], [4.0]]) == 5.0
assert module.step.StepOptions(rule="SGD").clip_scope == "global"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (33,), (4, 5, 6)])
def test_tensor_norm_equals_torch(
    norm_type: float, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    array = rng.normal(size=shape)
    expected = torch.linalg.vector_norm(torch.as_tensor(array), norm_type)
    assert_close(reference.norm.tensor_norm(array, norm_type), expected, torch.float64)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_tensor_norm_with_zeros_equals_torch(norm_type: float) -> None:
    array = torch.tensor([0.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    expected = torch.linalg.vector_norm(array, norm_type)
    assert_close(reference.norm.tensor_norm(array.numpy(), norm_type), expected, torch.float64)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_total_norm_equals_torch(norm_type: float, rng: np.random.Generator) -> None:
    arrays = [rng.normal(size=shape) for shape in [(31,), (4, 8), (), (2, 1, 3)]]
    tensors = [torch.as_tensor(array) for array in arrays]
    if norm_type == 0:  # torch counts tensors for p = 0
        expected = torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors]), norm_type)
    else:
        expected = torch.nn.utils.get_total_norm(tensors, norm_type)
    assert_close(reference.norm.total_norm(arrays, norm_type), expected, torch.float64)


@given(lists_of_arrays, st.sampled_from([2.0, 1.0, 3.0, 0.5, INF, -INF]))
def test_total_norm_equals_torch_for_any_list(lists: list[list[float]], norm_type: float) -> None:
    tensors = [torch.tensor(values, dtype=torch.float64) for values in lists]
    expected = torch.nn.utils.get_total_norm(tensors, norm_type)
    assert_close(reference.norm.total_norm(lists, norm_type), float(expected), torch.float64)


@given(st.lists(finite_elements, max_size=20), st.sampled_from([1.0, 2.0, 3.0, INF]))
def test_norm_lies_between_its_bounds(values: list[float], norm_type: float) -> None:
    norm = reference.norm.tensor_norm(values, norm_type)
    largest = max(map(abs, values), default=0.0)
    assert norm >= largest * (1 - 1e-15)
    assert norm <= largest * max(1.0, len(values) ** (1 / norm_type)) * (1 + 1e-12)


@given(st.lists(finite_elements, max_size=20), st.integers(-40, 40))
def test_norm_is_homogeneous(values: list[float], exponent: int) -> None:
    array = np.array(values) / 2.0**600
    array[np.abs(array) < 1e-280] = 0.0
    factor = 2.0**exponent
    scaled = reference.norm.tensor_norm(array * factor)
    assert scaled == reference.norm.tensor_norm(array) * factor


@pytest.mark.parametrize("magnitude", [3e19, 1e200, 1e-200, 5e-324, 1e307])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, 0.5, -1.0, INF, -INF])
def test_norm_neither_overflows_nor_underflows(magnitude: float, norm_type: float) -> None:
    expected = magnitude * (4.0 ** (1 / norm_type) if math.isfinite(norm_type) else 1.0)
    norm = reference.norm.total_norm([[magnitude, -magnitude], [magnitude], [magnitude]], norm_type)
    np.testing.assert_allclose(norm, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_nonfinite_elements_decide_the_norm(norm_type: float) -> None:
    total_norm = reference.norm.total_norm
    assert total_norm([[1.0], [INF]], norm_type) == INF
    assert total_norm([[1.0], [-INF]], norm_type) == INF
    assert math.isnan(total_norm([[1.0, INF], [math.nan]], norm_type))


@pytest.mark.parametrize("values", [[1.0, INF], [-INF, 2.0], [1.0, math.nan], [math.nan, INF]])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, INF])
def test_nonfinite_norm_equals_torch(norm_type: float, values: list[float]) -> None:
    expected = torch.linalg.vector_norm(torch.tensor(values, dtype=torch.float64), norm_type)
    assert_close(reference.norm.tensor_norm(values, norm_type), expected, torch.float64)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_empty_input_has_norm_zero(norm_type: float) -> None:
    assert reference.norm.total_norm([], norm_type) == 0.0
    assert reference.norm.total_norm([np.zeros((0, 3)), []], norm_type) == 0.0
    assert reference.norm.total_norm([np.zeros(0), [2.0]], norm_type) == (norm_type == 0 or 2.0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_zeros_have_norm_zero(norm_type: float) -> None:
    assert reference.norm.total_norm([np.zeros(3), np.zeros((2, 2))], norm_type) == 0.0


def test_nan_norm_type_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor_norm: norm_type must be a number, got nan"):
        reference.norm.total_norm([[1.0]], math.nan)
