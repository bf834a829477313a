// What processes exchange between the passes: a row of numbers for each scope of the clip, in a form that any
// collective can carry.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#include "core/host_device.h"
#include "core/norm.h"

namespace steadygrad {

// The kind of norm decides how processes combine `medium`: by a sum or by an extreme. For a general p it
// holds the scope's norm, since powers of different tensors have different scales.
struct ScopeSums {
  double small = 0;
  double medium = 0;
  double large = 0;
  double nonfinite = 0;
  double nan = 0;
};

constexpr int kScopeColumns = 5;
static_assert(sizeof(ScopeSums) == kScopeColumns * sizeof(double), "rows are read as arrays of doubles");

// Returns the sums of a scope without elements; for p < 0 its smallest magnitude is infinite.
STEADYGRAD_INLINE ScopeSums no_sums(NormType type) {
  ScopeSums sums;
  sums.medium = type.p < 0 ? INFINITY : 0.0;
  return sums;
}

STEADYGRAD_INLINE ScopeSums scope_sums(const NormPartial& sum, double medium) {
  return {sum.sums.small, medium, sum.sums.large, static_cast<double>(sum.nonfinite),
          static_cast<double>(sum.nan)};
}

// Combines all sums but the norms of a general p, which have to be combined relative to the extreme one.
STEADYGRAD_INLINE void combine(NormType type, ScopeSums& a, const ScopeSums& b) {
  a.small += b.small;
  a.medium = combine(type, a.medium, b.medium);
  a.large += b.large;
  a.nonfinite += b.nonfinite;
  a.nan += b.nan;
}

STEADYGRAD_INLINE Norm norm_of(NormType type, const ScopeSums& sums) {
  double norm = sums.medium;
  if (type.kind != NormKind::general) norm = finish_norm(type, {sums.small, sums.medium, sums.large}, 1);
  if (type.p < 0 && norm == INFINITY) norm = 0;
  return norm_with_counts(norm, static_cast<int64_t>(sums.nonfinite), static_cast<int64_t>(sums.nan));
}

// Applies the first row, which concerns the whole step: `medium` is more than 0 if a process must not take
// the step, and `nonfinite` counts the elements of all replicas. A single replica may be broken that no scope
// counts.
STEADYGRAD_INLINE Norm with_flags(Norm total, const ScopeSums& flags) {
  if (total.nonfinite > 0 || flags.nonfinite == 0) return total;
  return norm_with_counts(total.finite_norm, static_cast<int64_t>(flags.nonfinite), 0);
}

// A sum over processes between the passes. `rows` holds the flags, a row per param group, and with
// `per_tensor` a row per slot. The slot of a tensor is its place among all tensors that may take part.
struct Reduction {
  ScopeSums* rows = nullptr;  // null if there is one process
  // Per slot: whether this process counts the tensor; of several replicas only one is counted.
  const int32_t* counted = nullptr;
  int32_t slots = 0;
  bool per_tensor = false;
  // Combines the rows of all processes. It may throw, and then nothing has changed.
  std::function<void()> reduce;

  // Asks a clip policy outside of the kernels. It finds each scope's norm in its rows and leaves the limits
  // there, and it may throw as well. Where steps are decided on a device it is always called, with NaN as the
  // norms of a step that is not taken.
  std::function<void()> ask_policy;
};

}  // namespace steadygrad
