// What processes tell each other between the passes: a row of numbers for each scope of the clip, which any
// collective can carry.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#include "core/host_device.h"
#include "core/norm.h"

namespace steadygrad {

// Of `medium` the kind of norm says how processes combine it: sums, or extremes. For a general p it is the
// scope's norm, since powers of different tensors carry different scales.
struct ScopeSums {
  double small = 0;
  double medium = 0;
  double large = 0;
  double nonfinite = 0;
  double nan = 0;
};

constexpr int kScopeColumns = 5;
static_assert(sizeof(ScopeSums) == kScopeColumns * sizeof(double), "rows are read as arrays of doubles");

// A scope without elements: for p < 0 the smallest magnitude of none is infinite.
STEADYGRAD_INLINE ScopeSums no_sums(NormType type) {
  ScopeSums sums;
  sums.medium = type.p < 0 ? INFINITY : 0.0;
  return sums;
}

STEADYGRAD_INLINE ScopeSums scope_sums(const NormPartial& sum, double medium) {
  return {sum.sums.small, medium, sum.sums.large, static_cast<double>(sum.nonfinite),
          static_cast<double>(sum.nan)};
}

// All but the norms of a general p, which must be taken relative to the one that counts most.
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

// The first row is about the step as a whole: `medium` is more than 0 where a process must not take it,
// `nonfinite` counts elements, replicas included. One of them alone may be broken, which no scope counts.
STEADYGRAD_INLINE Norm with_flags(Norm total, const ScopeSums& flags) {
  if (total.nonfinite > 0 || flags.nonfinite == 0) return total;
  return norm_with_counts(total.finite_norm, static_cast<int64_t>(flags.nonfinite), 0);
}

// A sum over processes between the passes. `rows`: flags, one row per param group, and with `per_tensor` one
// per slot. A tensor's slot is its place among all that may take part.
struct Reduction {
  ScopeSums* rows = nullptr;  // null: there is one process
  const int32_t* counted =
      nullptr;  // per slot: whether this process counts the tensor, as one of its replicas
  int32_t slots = 0;
  bool per_tensor = false;
  std::function<void()>
      reduce;  // combines the rows of all processes; may throw, and then nothing has changed

  // Where a clip policy lives outside: it finds each scope's norm in its rows and leaves the limits there. It
  // may throw as well. What is queued on a device asks in any case: there the norms of a step that is not
  // taken are NaN.
  std::function<void()> ask_policy;
};

}  // namespace steadygrad
