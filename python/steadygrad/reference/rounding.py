"""Three ways to store an update in half precision, and the random bits of one of them.

An update is computed on a float32 value. Unlike in the rest of this package, the results are exact: float64 arrays hold
float32, bfloat16 or float16 numbers, with the same bits as the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .norm import Array

Words = NDArray[np.uint32]

# Random bits are drawn for chunks of so many elements.
CHUNK = 8192


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Attributes:
        digits: Number of bits of the significand, including the leading one.
        min_exponent: Exponent of the smallest normal number; subnormal numbers have the same spacing.
        largest: The largest finite number.
    """

    digits: int
    min_exponent: int
    largest: float

    def spacing(self, value: ArrayLike) -> Array:
        """Returns the distance from a finite number to the next one away from zero."""
        _, exponent = np.frexp(np.abs(np.asarray(value, dtype=np.float64)))
        place = np.maximum(exponent - 1, self.min_exponent) - (self.digits - 1)
        spacing: Array = np.ldexp(1.0, place)
        return spacing


FORMATS = {
    "bfloat16": Format(digits=8, min_exponent=-126, largest=float.fromhex("0x1.fep127")),
    "float16": Format(digits=11, min_exponent=-14, largest=65504.0),
}


def mixed_bits(bits: int) -> int:
    """Returns 64 well-mixed bits. Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014."""
    mask = 2**64 - 1
    bits = (bits + 0x9E3779B97F4A7C15) & mask
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & mask
    return bits ^ bits >> 31


def mixed_words(words: Words) -> Words:
    """Returns as many well-mixed words. Source: lowbias32, Wellons 2018, "Prospecting for hash functions"."""
    words = (words ^ words >> np.uint32(16)) * np.uint32(0x7FEB352D)
    words = (words ^ words >> np.uint32(15)) * np.uint32(0x846CA68B)
    mixed: Words = words ^ words >> np.uint32(16)
    return mixed


def random_words(seed: int, step: int, place: int, numel: int) -> Words:
    """Returns 32 random bits for each element of a parameter.

    Args:
        seed: The option ``rounding_seed``, in [0, 2^64).
        step: Number of steps taken before this one, in the optimizer's life.
        place: The parameter's place in the order of the param groups, from 0.
        numel: Number of elements. Their order is that of memory, or that of their indices if other tensors of the step
            have another layout.
    """
    chunks = []
    for begin in range(0, numel, CHUNK):
        key = mixed_bits(mixed_bits(mixed_bits(mixed_bits(seed) ^ step) ^ place) ^ begin)
        index = np.arange(min(CHUNK, numel - begin), dtype=np.uint32)
        words = mixed_words(index ^ np.uint32(key >> 32))
        chunks.append(mixed_words(words ^ np.uint32(key & 0xFFFFFFFF)))
    return np.concatenate(chunks) if chunks else np.empty(0, dtype=np.uint32)


@np.errstate(all="ignore")
def round_nearest(value: ArrayLike, dtype: str) -> Array:
    """Rounds to the nearest number of a format, ties to even; from half a spacing above the largest on, to infinity."""
    form = FORMATS[dtype]
    value = np.asarray(value, dtype=np.float64)
    spacing = form.spacing(np.where(np.isfinite(value), value, 1.0))
    rounded = np.where(np.isfinite(value), np.rint(value / spacing) * spacing, value)
    return np.where(np.abs(rounded) > form.largest, np.copysign(np.inf, rounded), rounded)


@np.errstate(all="ignore")
def round_stochastic(value: ArrayLike, dtype: str, words: Words) -> Array:
    """Rounds away from zero with a probability equal to the remainder, else towards zero.

    With the remainder r in units of the spacing, and k bits of the random word, a value is rounded away from zero if
    ``floor(r * 2^k) + word >= 2^k``. The remainder of a float32 value has at most 16 bits for bf16 and 13 bits for
    fp16. Where fp16 is subnormal it may have more than the 20 bits that are used, so the mean of the result is the
    value up to 2^-20 of a spacing. Values from the largest finite number on have no number above to choose, and are
    rounded to nearest.

    Args:
        value: Numbers of float32.
        dtype: ``"bfloat16"`` or ``"float16"``.
        words: 32 random bits for each number.
    """
    form = FORMATS[dtype]
    value = np.asarray(value, dtype=np.float64)
    within = np.abs(value) < form.largest
    magnitude = np.where(within, np.abs(value), 0.0)
    spacing = form.spacing(magnitude)
    below = np.floor(magnitude / spacing)
    is_subnormal = magnitude < 2.0**form.min_exponent
    bits = np.where(is_subnormal, 20, 13) if dtype == "float16" else np.full(value.shape, 16)
    remainder = np.floor((magnitude / spacing - below) * 2.0**bits)
    up = remainder + (words >> (32 - bits).astype(np.uint32)) >= 2.0**bits
    rounded = np.copysign((below + up) * spacing, value)
    return np.where(within, rounded, round_nearest(value, dtype))


def _float32(value: Any) -> Array:
    return np.asarray(value).astype(np.float32).astype(np.float64)


@np.errstate(all="ignore")
def kahan_value(param: ArrayLike, compensation: ArrayLike, dtype: str) -> Array:
    """Returns the value that a parameter and its compensation stand for: their sum in float32.

    The parameter is that sum, rounded. If it is not, something else has written it, and the value is the parameter
    alone. The test uses 255/256 of the compensation: a rounded compensation may lie half-way, but not beyond.
    """
    param = np.asarray(param, dtype=np.float64)
    compensation = np.asarray(compensation, dtype=np.float64)
    belongs = round_nearest(_float32(param + compensation * 255 / 256), dtype) == param
    return np.where(belongs, _float32(param + compensation), param)


@np.errstate(all="ignore")
def kahan_split(value: ArrayLike, dtype: str) -> tuple[Array, Array]:
    """Returns the parameter and the compensation that stand for a value.

    ``param = round(value)`` and ``compensation = round(value - param)``, or 0 where that is not finite.
    Source: Kahan 1965, "Further remarks on reducing truncation errors"; for parameters Zamirai et
    al. 2020, "Revisiting BFloat16 training".
    """
    value = np.asarray(value, dtype=np.float64)
    param = round_nearest(value, dtype)
    lost = value - param
    return param, round_nearest(np.where(np.isfinite(lost), lost, 0.0), dtype)


def master_value(param: ArrayLike, master: ArrayLike, dtype: str) -> Array:
    """Returns the master copy where it rounds to the parameter, else the parameter.

    Source: Micikevicius et al. 2018, "Mixed precision training", section 3.1.
    """
    param = np.asarray(param, dtype=np.float64)
    master = np.asarray(master, dtype=np.float64)
    return np.where(round_nearest(master, dtype) == param, master, param)
