// Defines norms. The order of every sum is fixed here, for all backends and every number of threads: element
// i of a chunk belongs to lane i % kLanes, lanes are added pairwise, and then chunks and tensors are added in
// the same way.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace steadygrad {

constexpr int kLanes = 128;

// `general` is any other p. Elements are divided by the largest magnitude (the smallest, for p < 0) so that
// powers stay in range. Division by a power of two near it would leave powers of up to 2^p.
enum class NormKind { two, one, infinity, negative_infinity, zero, general };

struct NormType {
  NormKind kind = NormKind::two;
  double p = 2.0;
};

STEADYGRAD_INLINE NormType norm_type(double p) {
  if (p == 2.0) return {NormKind::two, p};
  if (p == 1.0) return {NormKind::one, p};
  if (p == 0.0) return {NormKind::zero, p};
  if (p == INFINITY) return {NormKind::infinity, p};
  if (p == -INFINITY) return {NormKind::negative_infinity, p};
  return {NormKind::general, p};
}

// Squares of fp64 elements can leave fp64's range, so they are summed in three scaled classes (Blue 1978;
// constants of Anderson 2017, algorithm 978). Squares of fp32 elements are exact in fp64 and always `medium`,
// and so is every sum that is not of squares.
struct NormSums {
  double small = 0;
  double medium = 0;
  double large = 0;
};

constexpr double kSmallThreshold = 0x1p-511;
constexpr double kLargeThreshold = 0x1p486;
constexpr double kSmallScale = 0x1p537;
constexpr double kLargeScale = 0x1p-538;

struct NormPartial {
  NormSums sums;
  int64_t nonfinite = 0;
  int64_t nan = 0;
};

// The functors compute what an element adds to its lane, for a number or for a vector of numbers.
template <class V>
STEADYGRAD_INLINE V magnitude(V value) {
  return value < 0 ? -value : value;
}
struct Magnitude {
  template <class V>
  STEADYGRAD_INLINE V operator()(V x) const {
    return magnitude(x);
  }
};
struct Square {
  template <class V>
  STEADYGRAD_INLINE V operator()(V x) const {
    return x * x;
  }
};
struct SmallSquare {
  template <class V>
  STEADYGRAD_INLINE V operator()(V x) const {
    const V zero = {};
    const V scaled = (magnitude(x) < kSmallThreshold ? x : zero) * kSmallScale;
    return scaled * scaled;
  }
};
struct MediumSquare {
  template <class V>
  STEADYGRAD_INLINE V operator()(V x) const {
    const V zero = {};
    const V kept = magnitude(x) < kSmallThreshold ? zero : (magnitude(x) > kLargeThreshold ? zero : x);
    return kept * kept;
  }
};
struct LargeSquare {
  template <class V>
  STEADYGRAD_INLINE V operator()(V x) const {
    const V zero = {};
    const V scaled = (magnitude(x) > kLargeThreshold ? x : zero) * kLargeScale;
    return scaled * scaled;
  }
};

// Returns an element's term of the sum. Squares of fp64 use the three functors above instead.
STEADYGRAD_INLINE double norm_term(NormType type, double x, double scale) {
  switch (type.kind) {
    case NormKind::two:
      return x * x;
    case NormKind::zero:
      return x != 0 ? 1.0 : 0.0;
    case NormKind::general:
      return std::pow(std::fabs(x / scale), type.p);
    default:
      return magnitude(x);
  }
}

// A norm with its counts. Non-finite elements are counted and, in `finite_norm`, treated as zero.
struct Norm {
  double norm = 0;
  double finite_norm = 0;
  int64_t nonfinite = 0;
  int64_t nan = 0;
};

STEADYGRAD_INLINE Norm norm_with_counts(double finite_norm, int64_t nonfinite, int64_t nan) {
  Norm norm{finite_norm, finite_norm, nonfinite, nan};
  if (nonfinite > 0) norm.norm = INFINITY;
  if (nan > 0) norm.norm = NAN;
  return norm;
}

// Returns whether the sum is finite only if every element is; other kinds have to look at the elements.
STEADYGRAD_INLINE bool sum_shows_nonfinite(NormType type) {
  return type.kind == NormKind::two || type.kind == NormKind::one;
}

// Returns what elements are divided by for a general p, so that the extreme one becomes 1 and no power
// exceeds 1.
STEADYGRAD_INLINE double scale_for(double extreme) {
  return extreme == 0 || extreme - extreme != 0 ? 1 : extreme;
}

// Returns scale * sum^(1/p), using the root's square root twice, since the root may leave the range although
// the product does not.
STEADYGRAD_INLINE double scaled_root(double scale, double sum, double p) {
  const double half = std::pow(sum, 0.5 / p);
  return scale * half * half;
}

// Returns the value of a lane before its first element.
STEADYGRAD_INLINE double norm_identity(NormType type) {
  return type.kind == NormKind::negative_infinity ? INFINITY : 0.0;
}

STEADYGRAD_INLINE double combine(NormType type, double a, double b) {
  if (type.kind == NormKind::infinity) return a > b ? a : b;
  if (type.kind == NormKind::negative_infinity) return a < b ? a : b;
  return a + b;
}

struct Add {
  template <class V>
  STEADYGRAD_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <class V>
  STEADYGRAD_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <class V>
  STEADYGRAD_INLINE V operator()(V a, V b) const {
    return a < b ? a : b;
  }
};

STEADYGRAD_INLINE void combine(NormType type, NormPartial& a, const NormPartial& b) {
  a.sums.small += b.sums.small;
  a.sums.medium = combine(type, a.sums.medium, b.sums.medium);
  a.sums.large += b.sums.large;
  a.nonfinite += b.nonfinite;
  a.nan += b.nan;
}

// Combines `count` values in the fixed order; `lanes` has room for kLanes values. Lanes past `count` would
// only add zeros, so they are left out.
template <class Partial, class Get, class Combine>
STEADYGRAD_INLINE Partial combine_in_order(int64_t count, Partial* lanes, Get get, Combine combine) {
  if (count == 1) return get(0);
  int width = 1;
  while (width < kLanes && width < count) width *= 2;
  for (int64_t i = 0; i < width && i < count; ++i) lanes[i] = get(i);
  for (int64_t i = kLanes; i < count; ++i) combine(lanes[i % kLanes], get(i));
  int64_t filled = count < width ? count : width;
  for (int half = width / 2; half >= 1; half /= 2) {
    for (int64_t i = 0; i + half < filled; ++i) combine(lanes[i], lanes[i + half]);
    if (filled > half) filled = half;
  }
  return lanes[0];
}

// Combines the lanes of a chunk, of which only the first `filled` hold values.
STEADYGRAD_INLINE double combine_lanes(NormType type, double* lanes, int filled) {
  for (int half = kLanes / 2; half >= 1; half /= 2) {
    const int pairs = filled - half < half ? filled - half : half;
    if (pairs <= 0) continue;
    switch (type.kind) {
      case NormKind::infinity:
      case NormKind::negative_infinity:
        for (int i = 0; i < pairs; ++i) lanes[i] = combine(type, lanes[i], lanes[i + half]);
        break;
      default:
        for (int i = 0; i < pairs; ++i) lanes[i] += lanes[i + half];
    }
    filled = half;
  }
  return lanes[0];
}

// Returns the norm from its sums. `scale` is the divisor of the elements of a general norm.
STEADYGRAD_INLINE double finish_norm(NormType type, const NormSums& sums, double scale) {
  switch (type.kind) {
    case NormKind::two: {
      if (sums.large > 0) {
        return std::sqrt(sums.large + sums.medium * kLargeScale * kLargeScale) / kLargeScale;
      }
      if (sums.small > 0) {
        const double a = std::sqrt(sums.medium);
        const double b = std::sqrt(sums.small) / kSmallScale;
        const double high = a > b ? a : b;
        const double low = a > b ? b : a;
        return high * std::sqrt(1 + (low / high) * (low / high));
      }
      return std::sqrt(sums.medium);
    }
    case NormKind::general:
      return scaled_root(scale, sums.medium, type.p);
    default:
      return sums.medium + 0.0;  // the magnitude of -0 is 0
  }
}

}  // namespace steadygrad
