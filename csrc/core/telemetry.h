// Telemetry: a step leaves a row of numbers in a ring, where the newest row replaces the oldest.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"
#include "core/policy.h"
#include "core/step.h"

namespace steadygrad {

// A row holds the norm before and after the clip, the limit, flags and the number of non-finite elements,
// then the norms of all parameters, then their numbers of non-finite elements. NaN stands for a missing
// number: a step without update has no norm after the clip, a parameter without gradient has no norm, and
// several limits are not one.
struct Telemetry {
  double* rows = nullptr;       // null if nothing is recorded
  int64_t* recorded = nullptr;  // the number of steps so far
  int64_t history = 0;          // the number of rows
  int64_t parameters = 0;       // 0 if only totals are recorded
};

constexpr int64_t kTelemetryNorm = 0;
constexpr int64_t kTelemetryClippedNorm = 1;
constexpr int64_t kTelemetryLimit = 2;
constexpr int64_t kTelemetryFlags = 3;
constexpr int64_t kTelemetryNonfinite = 4;
constexpr int64_t kTelemetryTotals = 5;

constexpr int kRecordedClipped = 1;
constexpr int kRecordedSkipped = 2;
constexpr int kRecordedRefused = 4;
constexpr int kRecordedSpiked = 8;

STEADYGRAD_INLINE int64_t row_size(const Telemetry& telemetry) {
  return kTelemetryTotals + 2 * telemetry.parameters;
}

STEADYGRAD_INLINE double* next_row(const Telemetry& telemetry) {
  // The number is taken as unsigned, so that even a negative one gives a row of the ring.
  const uint64_t place =
      static_cast<uint64_t>(*telemetry.recorded) % static_cast<uint64_t>(telemetry.history);
  return telemetry.rows + static_cast<int64_t>(place) * row_size(telemetry);
}

// The outcome of a step as it is recorded.
struct RecordedStep {
  Norm total;
  double clipped_norm = NAN;
  double limit = NAN;
  int flags = 0;
};

STEADYGRAD_INLINE bool is_taken(const RecordedStep& step) {
  return (step.flags & (kRecordedSkipped | kRecordedRefused)) == 0;
}

// If a unit was clipped, the norm after the clip is not known, since nothing computes it.
STEADYGRAD_INLINE bool has_clipped_norm(const RecordedStep& step, const Policies& policies) {
  return is_taken(step) && !(clips_units(policies) && (step.flags & kRecordedClipped) != 0);
}

STEADYGRAD_INLINE void record_totals(double* row, const StepOptions& options, const RecordedStep& step) {
  row[kTelemetryNorm] = is_taken(step) ? seen_norm(options, step.total) : step.total.norm;
  row[kTelemetryClippedNorm] = step.clipped_norm;
  row[kTelemetryLimit] = step.limit;
  row[kTelemetryFlags] = step.flags;
  row[kTelemetryNonfinite] = static_cast<double>(step.total.nonfinite);
}

STEADYGRAD_INLINE void record_parameter(const Telemetry& telemetry, double* row, int64_t place, double norm,
                                        double nonfinite) {
  row[kTelemetryTotals + place] = norm;
  row[kTelemetryTotals + telemetry.parameters + place] = nonfinite;
}

// Returns the single limit of the total norm over the groups that have elements, or NaN. With a policy there
// is no limit if the step is not taken.
template <class HasGroup>
STEADYGRAD_INLINE double total_limit(const Policies& policies, const GroupOptions* groups, int32_t count,
                                     const StepOptions& options, bool taken, HasGroup has_group) {
  if (options.clip_scope != ClipScope::global) return NAN;
  double limit = NAN;
  for (int32_t g = 0; g < count; ++g) {
    if (!has_group(g)) continue;
    if (limit == limit && groups[g].max_norm != limit) return NAN;
    limit = groups[g].max_norm;
  }
  if (policies.clip_rows == nullptr) return limit;
  if (!taken || clips_units(policies)) return NAN;
  return policies.clip_rows[kLimit] < limit ? policies.clip_rows[kLimit] : limit;
}

// Returns a term of the norm of norms, relative to the extreme one.
STEADYGRAD_INLINE double relative_power(NormType type, double ratio) {
  switch (type.kind) {
    case NormKind::two:
      return ratio * ratio;
    case NormKind::one:
      return ratio;
    default:
      return std::pow(ratio, type.p);
  }
}
// Returns the norm of norms from the sum of these terms.
STEADYGRAD_INLINE double relative_root(NormType type, double extreme, double sum) {
  switch (type.kind) {
    case NormKind::two:
      return extreme * std::sqrt(sum);
    case NormKind::one:
      return extreme * sum;
    default:
      return scaled_root(extreme, sum, type.p);
  }
}

// Returns the norm of a few norms, one after the other; a missing norm counts as 0.
template <class NormAt>
STEADYGRAD_INLINE double norm_in_turn(NormType type, int64_t count, NormAt norm_at) {
  double extreme = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double norm = norm_at(i);
    extreme = norm > extreme || norm != norm ? norm : extreme;
  }
  if (type.kind == NormKind::infinity || !(extreme > 0) || !is_finite(extreme)) return extreme;
  double powers = 0;
  for (int64_t i = 0; i < count; ++i) powers += relative_power(type, norm_at(i) / extreme);
  return relative_root(type, extreme, powers);
}

}  // namespace steadygrad
