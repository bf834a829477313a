// Sums of squares in twice the precision of fp32, without fp64.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace steadygrad {

// A sum of fp32 squares. Whatever a rounding takes from `high` is found exactly and goes to `low`, so that
// only the roundings of `low` are lost: at most 2^-36 of a sum of 64 squares.
struct FloatPair {
  float high = 0;
  float low = 0;

  // Adds value + rest, of which rest is the far smaller (TwoSum; Knuth, The Art of Computer
  // Programming, 4.2.2).
  STEADYGRAD_INLINE void add(float value, float rest) {
    const float sum = high + value;
    const float added = sum - high;
    const float lost = (high - (sum - added)) + (value - added);
    high = sum;
    low += lost + rest;
  }
  STEADYGRAD_INLINE void add(const FloatPair& other) { add(other.high, other.low); }

  STEADYGRAD_INLINE void add_square(float x) {
    const float square = x * x;
    add(square, std::fma(x, x, -square));
  }

  STEADYGRAD_INLINE double value() const { return static_cast<double>(high) + static_cast<double>(low); }

  // Whether the sum of a chunk's squares is as good as that. A square that overflows makes the sum NaN, and
  // one below 2^-102 loses up to 2^-150, which fp32 cannot hold; a chunk has 2^13.
  STEADYGRAD_INLINE static bool holds(double sum) { return sum >= 0x1p-96 && sum < INFINITY; }
};

}  // namespace steadygrad
