// Norms over all processes, from the rows that came back, on a block of kLanes threads: all of them call.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/backend.h"
#include "core/policy.h"
#include "core/scope_sums.h"
#include "core/step.h"
#include "cuda/lanes.h"

namespace steadygrad::cuda {

// Powers of different tensors carry different scales: their norms are combined, relative to the one that
// counts most. `numbers` is shared memory for kLanes of them.
template <class NormAt>
__device__ __forceinline__ double general_norm(NormType type, int64_t count, double* numbers,
                                               NormAt norm_at) {
  const NormType extremes = norm_type(type.p > 0 ? INFINITY : -INFINITY);
  const double extreme = block_combine_in_order(count, norm_identity(extremes), numbers, norm_at,
                                                [&](double& a, double b) { a = combine(extremes, a, b); });
  if (!(extreme > 0) || !is_finite(extreme)) return extreme;
  const double powers = block_combine_in_order(
      count, 0.0, numbers, [&](int64_t i) { return std::pow(norm_at(i) / extreme, type.p); },
      [](double& a, double b) { a += b; });
  return scaled_root(extreme, powers, type.p);
}

// `rows`: flags, then one per param group (core/scope_sums.h). `lanes` and `numbers`: shared memory.
__device__ __forceinline__ Norm reduced_total(NormType type, const ScopeSums* rows, int32_t groups,
                                              ScopeSums* lanes, double* numbers) {
  const ScopeSums* const group_rows = rows + 1;
  ScopeSums sums = block_combine_in_order(
      groups, no_sums(type), lanes, [&](int64_t g) { return group_rows[g]; },
      [&](ScopeSums& a, const ScopeSums& b) { combine(type, a, b); });
  if (type.kind == NormKind::general) {
    sums.medium = general_norm(type, groups, numbers, [&](int64_t g) { return group_rows[g].medium; });
  }
  return with_flags(norm_of(type, sums), rows[0]);
}

// Leaves the scopes' norms in the policy's rows and has the limits given.
void ask_policy(const char* function, int32_t groups, const StepOptions& options, const Policies& policies,
                const Reduction& reduction, Stream stream);

}  // namespace steadygrad::cuda
