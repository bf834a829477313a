"""The 2-norm where a GPU is slow in fp64: sums of squares as pairs of fp32, on the emulator, beside those in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steadygrad as sg
from steadygrad import _kernels
from steadygrad.memory import NormOutput, allocator
from tests.backends import BACKENDS
from tests.clip.test_norm import SCALES, normal

EMULATED = BACKENDS[1]
pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(bool(EMULATED.why_not()), reason=str(EMULATED.why_not())),
]

# Norms from pairs of fp32 differ from those of fp64 by at most this part.
PRECISION = 2.0**-37
# The magnitudes between which no square of a chunk leaves the range of fp32.
SMALLEST, LARGEST = 2.0**-48, 2.0**63

Norms = Callable[..., tuple[float, float]]
Take = Callable[[str], None]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Iterator[Take]:
    """Return a function that sets whether sums are taken in "fp64" or in "pairs"."""
    ratios = {"fp64": "2", "pairs": "64"}
    with EMULATED.active():
        yield lambda sums: monkeypatch.setenv("STEADYGRAD_EMULATION_FP64_RATIO", ratios[sums])


@pytest.fixture
def norms(take: Take) -> Norms:
    """Return a function that finds a norm in fp64 and in pairs, both before they are rounded to fp32."""

    def found(sums: str, tensors: Sequence[Tensor], norm_type: float) -> float:
        take(sums)
        output = NormOutput(EMULATED.device)
        assert output.tensors is not None
        _kernels.grad_norm(
            list(tensors), norm_type, output.tensors, allocator(EMULATED.device), None
        )
        return output.tensors[2].item()

    def both(*tensors: Tensor, norm_type: float = 2.0) -> tuple[float, float]:
        return found("fp64", tensors, norm_type), found("pairs", tensors, norm_type)

    return both


def assert_close(in_fp64: float, in_pairs: float) -> None:
    """Assert that both are the same number to the precision of pairs, and the same in fp32 to one ulp."""
    assert abs(in_pairs - in_fp64) <= PRECISION * in_fp64
    with np.errstate(over="ignore"):
        a, b = np.float32(in_fp64), np.float32(in_pairs)
    assert a == b or abs(a - b) <= np.spacing(a)


@pytest.mark.parametrize("size", [1, 33, 127, 129, 4099, 8192, 8193, 65537])
def test_every_size_and_scale(norms: Norms, size: int) -> None:
    for scale in SCALES:
        assert_close(*norms(normal(size, scale, seed=size)))


def test_pairs_are_taken_where_squares_are_in_range(norms: Norms) -> None:
    for scale in (1e-12, 1e-6, 1.0, 1e6, 1e17):
        in_fp64, in_pairs = norms(normal(65537, scale))
        assert in_fp64 != in_pairs
        assert_close(in_fp64, in_pairs)
    for scale in (1e-42, 1e-30, 1e-18, 1e20, 1e36):
        in_fp64, in_pairs = norms(normal(65536, scale))
        assert in_fp64 == in_pairs


@pytest.mark.parametrize("exponents", [(-44.0, 38.0), (-44.0, -10.0), (-20.0, 18.0), (-6.0, 0.0)])
def test_elements_that_differ_by_many_decades(norms: Norms, exponents: tuple[float, float]) -> None:
    low, high = exponents
    for size in (33, 4099, 65537):
        generator = torch.Generator().manual_seed(size)
        drawn = torch.rand(size, generator=generator, dtype=torch.float64)
        assert_close(*norms((10.0 ** (low + (high - low) * drawn)).float()))


@pytest.mark.parametrize("among", [0.0, 1e-45, 1e-38, 1e-20, 1e-12, 1.0, 1e18])
@pytest.mark.parametrize("one", [1e-45, 1e-30, SMALLEST, 1e-6, 1.0, LARGEST, 2e19, 3.4e38])
def test_one_element_among_others(norms: Norms, one: float, among: float) -> None:
    for place in (0, 130, 8191):
        values = torch.full((8192,), among)
        values[place] = one
        assert_close(*norms(values))


@pytest.mark.parametrize("edge", [SMALLEST, LARGEST, 2.0**-51, 2.0**-63, 2.0**-75, 2.0**64])
def test_about_the_edges_of_the_range(norms: Norms, edge: float) -> None:
    for count in (1, 2, 64, 8192):
        for factor in (0.5, 0.7071, 1 - 2**-24, 1.0, 1 + 2**-23, 1.4142, 1.9999):
            assert_close(*norms(torch.full((count,), edge * factor)))


def test_roundings_are_kept(norms: Norms) -> None:
    """Check sums that pairs hold exactly, and of which fp32 would lose every further term."""
    halves = torch.full((8192,), 2.0**-12)  # each square is half an ulp of 1
    halves[:128] = 1.0
    turning = torch.full((8192,), 2.0**-12)  # the large one comes last
    turning[-128:] = 1.0
    whole = torch.arange(8192.0).fmod(2048) - 1024
    for values in (halves, turning, whole):
        in_fp64, in_pairs = norms(values)
        assert in_fp64 == in_pairs == math.sqrt(values.double().square().sum().item())


def test_equal_terms(norms: Norms) -> None:
    for value in (3e-5, 1 / 3, 0.1, 1 + 2.0**-23, 1e18 / 3, 2.0**-40 / 3):
        assert_close(*norms(torch.full((300_000,), value)))


def test_zero(norms: Norms) -> None:
    zeros = torch.zeros(8192 * 2 + 5)
    zeros[::3] = -0.0
    assert norms(zeros) == (0.0, 0.0)
    zeros[9000] = 1e-45
    in_fp64, in_pairs = norms(zeros)
    assert in_fp64 == in_pairs > 0


@pytest.mark.parametrize("element", [math.nan, math.inf, -math.inf])
def test_nonfinite_elements(take: Take, element: float) -> None:
    gradients = [normal(8192 * 3 + 77, 1.0), torch.full((99,), 2e19)]
    gradients[0][[5, 8192 * 2]] = element
    for sums in ("fp64", "pairs"):
        take(sums)
        norm = sg.get_total_norm(gradients)
        assert math.isnan(norm) if math.isnan(element) else norm == math.inf
        with pytest.raises(RuntimeError, match="2 non-finite"):
            sg.get_total_norm(gradients, error_if_nonfinite=True)


def test_types_and_places_in_memory(norms: Norms) -> None:
    wide = normal(20_003, 3.0)
    halves = [wide.bfloat16(), wide.half(), wide.half()[3:], wide.bfloat16()[::2]]
    for tensors in ([wide[1:]], [wide[1:], wide[::2]], halves, [wide, *halves]):
        assert_close(*norms(*tensors))
    in_fp64, in_pairs = norms(wide[1:])
    assert in_fp64 != in_pairs
    assert_close(*norms(torch.full((9000,), 1e-30).bfloat16(), torch.full((3,), 1e25).bfloat16()))


def test_fp64_and_other_norms_do_without(norms: Norms) -> None:
    values = normal(9001, 3.0)
    in_fp64, in_pairs = norms(values, values.double())
    assert in_fp64 == in_pairs
    for norm_type in (1.0, math.inf, -math.inf, 0.0, 3.0):
        in_fp64, in_pairs = norms(values, norm_type=norm_type)
        assert in_fp64 == in_pairs


def test_steps(take: Take) -> None:
    """Take steps whose gradients are unscaled and penalised, of which some leave the range of pairs."""

    def run(sums: str) -> tuple[list[Tensor], list[float]]:
        take(sums)
        params = [Parameter(normal(size, 1.0, seed=size)) for size in (9001, 40, 8192)]
        optimizer = sg.optim.AdamW(params, lr=0.1, max_norm=1.0, l1=1e-3, l2=1e-2)
        norms = []
        for step, scale in enumerate((1.0, 1e-3, 1e24, 1e4)):
            for param in params:
                param.grad = normal(param.numel(), scale, seed=step)
            optimizer.grad_scale = torch.tensor(8.0)
            optimizer.step()
            norms.append(optimizer.grad_norm.item())
        return params, norms

    (params, norms), (params_of_pairs, norms_of_pairs) = run("fp64"), run("pairs")
    np.testing.assert_array_max_ulp(
        np.float32(norms), np.float32(norms_of_pairs), maxulp=1, dtype=np.float32
    )
    for param, of_pairs in zip(params, params_of_pairs, strict=True):
        torch.testing.assert_close(of_pairs, param, rtol=1e-6, atol=1e-7)
