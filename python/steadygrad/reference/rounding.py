"""How half-precision parameters are stored: three ways to round an update, and their random bits.

An update is computed on a float32 value. Here, unlike in the rest of this package, results are
exact: float64 arrays hold numbers of float32, bfloat16 or float16, bit for bit those of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .norm import Array

Words = NDArray[np.uint32]

# Random bits are drawn for pieces of so many elements.
CHUNK = 8192


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Attributes:
        digits: bits of the significand, the leading one included.
        min_exponent: of the smallest normal number; subnormal ones lie as far apart as those above.
        largest: the largest finite number.
    """

    digits: int
    min_exponent: int
    largest: float

    def spacing(self, value: ArrayLike) -> Array:
        """Return the distance from a finite number to the next one away from zero."""
        _, exponent = np.frexp(np.abs(np.asarray(value, dtype=np.float64)))
        place = np.maximum(exponent - 1, self.min_exponent) - (self.digits - 1)
        spacing: Array = np.ldexp(1.0, place)
        return spacing


FORMATS = {
    "bfloat16": Format(digits=8, min_exponent=-126, largest=float.fromhex("0x1.fep127")),
    "float16": Format(digits=11, min_exponent=-14, largest=65504.0),
}


def mixed_bits(bits: int) -> int:
    """Return 64 well-mixed bits. Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014."""
    mask = 2**64 - 1
    bits = (bits + 0x9E3779B97F4A7C15) & mask
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & mask
    return bits ^ bits >> 31


def mixed_words(words: Words) -> Words:
    """Return as many well-mixed words. Source: lowbias32, Wellons 2018, "Prospecting for hash functions"."""
    words = (words ^ words >> np.uint32(16)) * np.uint32(0x7FEB352D)
    words = (words ^ words >> np.uint32(15)) * np.uint32(0x846CA68B)
    mixed: Words = words ^ words >> np.uint32(16)
    return mixed


def random_words(seed: int, step: int, place: int, numel: int) -> Words:
    """Return 32 random bits for each element of a parameter.

    Args:
        seed: ``rounding_seed``, in [0, 2^64).
        step: how many steps were taken before this one, in the optimizer's life.
        place: the parameter's place in the order of the param groups, from 0.
        numel: elements, in the order of memory or, where other tensors of the step lie otherwise,
            of their indices.
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
    """Round to the nearest number of a format, ties to even; half a spacing past the largest is infinite."""
    form = FORMATS[dtype]
    value = np.asarray(value, dtype=np.float64)
    spacing = form.spacing(np.where(np.isfinite(value), value, 1.0))
    rounded = np.where(np.isfinite(value), np.rint(value / spacing) * spacing, value)
    return np.where(np.abs(rounded) > form.largest, np.copysign(np.inf, rounded), rounded)


@np.errstate(all="ignore")
def round_stochastic(value: ArrayLike, dtype: str, words: Words) -> Array:
    """Round away from zero with the probability of the remainder, else towards zero.

    With the remainder r in units of the spacing, and k bits of the random word, it is rounded away
    when ``floor(r * 2^k) + word >= 2^k``. A float32 value has a remainder of at most 16 bits (bf16),
    13 bits (fp16), or, where fp16 is subnormal, of more than the 20 that are looked at. So the mean
    is the value, to 2^-20 of a spacing. From the largest finite number on, there is no number above
    to choose, and it is rounded to nearest.

    Args:
        value: numbers of float32.
        dtype: ``"bfloat16"`` or ``"float16"``.
        words: 32 random bits for each.
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
    """Return the value that a parameter and its compensation stand for: their sum in float32.

    The parameter is that sum rounded. Where it is not, it was written by somebody else and is the
    value. 255/256 of the compensation is tested: rounded itself, it may lie half-way, but not beyond.
    """
    param = np.asarray(param, dtype=np.float64)
    compensation = np.asarray(compensation, dtype=np.float64)
    belongs = round_nearest(_float32(param + compensation * 255 / 256), dtype) == param
    return np.where(belongs, _float32(param + compensation), param)


@np.errstate(all="ignore")
def kahan_split(value: ArrayLike, dtype: str) -> tuple[Array, Array]:
    """Return the parameter and the compensation that stand for a value.

    ``param = round(value)``, ``compensation = round(value - param)``, 0 where that is not finite.
    Source: Kahan 1965, "Further remarks on reducing truncation errors"; for parameters Zamirai et
    al. 2020, "Revisiting BFloat16 training".
    """
    value = np.asarray(value, dtype=np.float64)
    param = round_nearest(value, dtype)
    lost = value - param
    return param, round_nearest(np.where(np.isfinite(lost), lost, 0.0), dtype)


def master_value(param: ArrayLike, master: ArrayLike, dtype: str) -> Array:
    """Return the master copy where it rounds to the parameter, else the parameter.

    Source: Micikevicius et al. 2018, "Mixed precision training", section 3.1.
    """
    param = np.asarray(param, dtype=np.float64)
    master = np.asarray(master, dtype=np.float64)
    return np.where(round_nearest(master, dtype) == param, master, param)
