// Computes the value of a penalty from sums over its parameters.
#pragma once

#include "core/norm.h"

namespace steadygrad {

constexpr NormType kMagnitudes{NormKind::one, 1};
constexpr NormType kSquares{NormKind::two, 2};

struct PenaltySums {
  double magnitudes = 0;
  NormSums squares;
};

STEADYGRAD_INLINE void add(PenaltySums& a, const PenaltySums& b) {
  a.magnitudes += b.magnitudes;
  a.squares.small += b.squares.small;
  a.squares.medium += b.squares.medium;
  a.squares.large += b.squares.large;
}

// l1 * sum|p| + l2 / 2 * sum p^2. A zero coefficient adds nothing, even if the sum is not finite.
STEADYGRAD_INLINE double penalty_value(double l1, double l2, const PenaltySums& sums) {
  const double norm = finish_norm(kSquares, sums.squares, 1);
  return (l1 != 0 ? l1 * sums.magnitudes : 0) + (l2 != 0 ? l2 / 2 * norm * norm : 0);
}

}  // namespace steadygrad
