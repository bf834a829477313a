// What a decided step leaves in its optimizer's ring. For all kLanes threads of a block, with the same
// arguments.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "core/telemetry.h"
#include "cuda/lanes.h"
#include "cuda/tensor_table.h"

namespace steadygrad::cuda {

template <class NormAt>
__device__ double norm_of_norms(NormType type, int64_t count, double* lanes, NormAt norm_at) {
  const double extreme = block_combine_in_order(count, 0.0, lanes, norm_at,
                                                [](double& a, double b) { a = b > a || b != b ? b : a; });
  if (type.kind == NormKind::infinity || !(extreme > 0) || !is_finite(extreme)) return extreme;
  const double powers = block_combine_in_order(
      count, 0.0, lanes, [&](int64_t i) { return relative_power(type, norm_at(i) / extreme); },
      [](double& a, double b) { a += b; });
  return relative_root(type, extreme, powers);
}

// Tensors stand in the order of their slots. Those that only other processes have are not clipped here.
__device__ inline double coefficient_of_slot(const TensorTable& table, const double* coefficients,
                                             int32_t slot) {
  int32_t low = 0;
  int32_t high = table.tensors;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (table.heads[middle].slot < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < table.tensors && table.heads[low].slot == slot ? coefficients[low] : 1;
}

// Returns the norm of all gradients, each scaled by its scope's coefficient.
template <class Norms, class Shared>
__device__ double clipped_norm(const TensorTable& table, const double* coefficients,
                               const StepOptions& options, const Norms& norms, const Norm& total,
                               Shared& shared) {
  const NormType type = options.norm_type;
  if (options.clip_scope == ClipScope::tensor) {
    return norm_of_norms(type, norms.count(), shared.numbers.data(), [&](int64_t i) {
      const int32_t place = static_cast<int32_t>(i);
      return coefficient_of_slot(table, coefficients, norms.slot(place)) *
             seen_norm(options, norms.one_of_all(place));
    });
  }
  double first = 1;
  bool found = false;
  bool alike = options.clip_scope == ClipScope::global;
  for (int32_t g = 0; g < table.groups && alike; ++g) {
    if (!norms.has_group(g)) continue;
    alike = !found || coefficients[g] == first;
    first = coefficients[g];
    found = true;
  }
  if (alike) return first * seen_norm(options, total);
  return norm_in_turn(type, table.groups, [&](int64_t i) {
    const int32_t g = static_cast<int32_t>(i);
    if (!norms.has_group(g)) return 0.0;
    return coefficients[g] * seen_norm(options, norms.group(g));
  });
}

// `coefficients`: as the decision has left them.
template <class Norms, class Shared>
__device__ void record(const Telemetry& telemetry, const TensorTable& table, const double* coefficients,
                       const GroupOptions* groups, const StepOptions& options, const Policies& policies,
                       const Norms& norms, RecordedStep step, Shared& shared) {
  if (has_clipped_norm(step, policies))
    step.clipped_norm = clipped_norm(table, coefficients, options, norms, step.total, shared);
  double* const row = next_row(telemetry);
  for (int64_t p = threadIdx.x; p < telemetry.parameters; p += kLanes) {
    record_parameter(telemetry, row, p, NAN, 0);
  }
  __syncthreads();
  if (telemetry.parameters > 0) {
    for (int32_t i = threadIdx.x; i < norms.count(); i += kLanes) {
      const Norm norm = norms.one_of_all(i);
      record_parameter(telemetry, row, norms.slot(i), norm.norm, static_cast<double>(norm.nonfinite));
    }
  }
  if (threadIdx.x != 0) return;
  step.limit = total_limit(policies, groups, table.groups, options, is_taken(step),
                           [&](int32_t g) { return norms.has_group(g); });
  record_totals(row, options, step);
  *telemetry.recorded += 1;
}

}  // namespace steadygrad::cuda
