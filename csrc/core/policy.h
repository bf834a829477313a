// Clip policies: they compute a scope's coefficient from its norm and a small state, and update the state.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/gradient.h"
#include "core/host_device.h"
#include "core/norm.h"

namespace steadygrad {

// `given`: the limit comes from Reduction::ask_policy between the passes. `adaptive`: clipping by output unit
// (core/unit_clip.h), where `level` is eps and a scope as a whole has no limit.
enum class PolicyKind : uint8_t { none, percentile, zscore, relative, damp, given, adaptive };

struct ClipPolicy {
  PolicyKind kind = PolicyKind::none;
  double max_norm = INFINITY;  // a hard limit; for `relative` it limits the total norm during the warm-up
  double level = 0;            // percentile as a fraction, z-score, ratio, or power
  double decay = 0;            // decay of the moving averages
  double factor = 1;           // factor of a z-score's limit
  int64_t warmup = 0;
  int64_t window = 0;
};

// Skips steps whose norm is above mean + sigma * std of the last `window` norms; with a window of 0 it skips
// none.
struct SpikePolicy {
  double sigma = 0;
  int64_t window = 0;
};

// The state of a scope is a row of numbers. It begins with the coefficient and the limit of the last step,
// then come
//   zscore:     count, mean, variance (during the warm-up the sum of squared deviations)
//   relative:   count, average
//   percentile: count, place of the oldest, norms in the order of steps[window], sorted[window]
// The row of a SpikePolicy is that of a percentile without the sorted norms.
struct Policies {
  ClipPolicy clip;
  SpikePolicy skip;
  double* clip_rows = nullptr;  // null if this step has no clip policy
  double* skip_row = nullptr;   // null if this step skips no spikes
};

STEADYGRAD_INLINE bool clips_units(const Policies& policies) {
  return policies.clip.kind == PolicyKind::adaptive && policies.clip_rows != nullptr;
}

constexpr int64_t kCoefficient = 0;
constexpr int64_t kLimit = 1;
constexpr int64_t kCount = 2;
constexpr int64_t kMean = 3;
constexpr int64_t kVariance = 4;
constexpr int64_t kOldest = 3;
constexpr int64_t kNorms = 4;
constexpr double kZScoreEps = 1e-6;
// In the row of a scope whose limit is given, this column holds the norm that the policy is asked about.
constexpr int64_t kGivenNorm = 2;

STEADYGRAD_INLINE int64_t row_size(const ClipPolicy& policy) {
  switch (policy.kind) {
    case PolicyKind::given:
      return kGivenNorm + 1;
    case PolicyKind::percentile:
      return kNorms + 2 * policy.window;
    case PolicyKind::zscore:
      return kVariance + 1;
    case PolicyKind::relative:
      return kMean + 1;
    default:
      return kLimit + 1;
  }
}
STEADYGRAD_INLINE int64_t row_size(const SpikePolicy& policy) { return kNorms + policy.window; }

// A norm of 0 is not learnt: such a step is not clipped, and a history of zeros would clip everything from
// then on.
STEADYGRAD_INLINE bool is_entered(double norm) { return norm > 0 && is_finite(norm); }

// Kumar et al. 2025, "ZClip". The averages are updated with the norm to which a spike was clipped.
STEADYGRAD_INLINE double zscore_limit(const ClipPolicy& policy, double* row, double norm, bool enters) {
  const double count = row[kCount];
  if (count < static_cast<double>(policy.warmup)) {
    if (enters) {
      const double deviation = norm - row[kMean];
      const double mean = row[kMean] + deviation / (count + 1);
      const double squares = row[kVariance] + deviation * (norm - mean);
      row[kCount] = count + 1;
      row[kMean] = mean;
      row[kVariance] = count + 1 < static_cast<double>(policy.warmup) ? squares : squares / (count + 1);
    }
    return policy.max_norm;
  }
  const double mean = row[kMean];
  const double deviation = std::sqrt(row[kVariance]);
  const double z = (norm - mean) / (deviation + kZScoreEps);
  double limit = INFINITY;
  double fed = norm;
  if (z > policy.level) {
    limit = (mean + policy.level * deviation / (z / policy.level)) * policy.factor;
    fed = limit;
  }
  if (enters) {
    const double moved = policy.decay * mean + (1 - policy.decay) * fed;
    row[kMean] = moved;
    row[kVariance] = policy.decay * row[kVariance] + (1 - policy.decay) * (fed - moved) * (fed - moved);
  }
  return limit < policy.max_norm ? limit : policy.max_norm;
}

// Wang et al. 2025, "AdaGC". During the warm-up the total norm is clipped, and the smallest clipped norm is
// kept.
STEADYGRAD_INLINE double relative_coefficient(const ClipPolicy& policy, double* row, double norm,
                                              double total, bool enters) {
  const double count = row[kCount];
  const double average = row[kMean];
  const bool warms_up = count < static_cast<double>(policy.warmup);
  const bool by_total = warms_up || count == 0;
  row[kLimit] = by_total ? policy.max_norm : policy.level * average;
  const double coefficient = clip_coefficient(row[kLimit], by_total ? total : norm);
  const double clipped = coefficient * norm;
  if (!enters || !(clipped > 0)) return coefficient;
  row[kCount] = count + 1;
  if (count == 0) {
    row[kMean] = clipped;
  } else if (warms_up) {
    row[kMean] = average < clipped ? average : clipped;
  } else {
    row[kMean] = policy.decay * average + (1 - policy.decay) * clipped;
  }
  return coefficient;
}

STEADYGRAD_INLINE double damping(const ClipPolicy& policy, double norm) {
  return norm > policy.max_norm ? std::pow(policy.max_norm / norm, policy.level) : 1.0;
}

// A limit that is NaN or negative limits nothing: it is on a device, where the host cannot check it.
STEADYGRAD_INLINE void apply_given(double* row, double norm) {
  const double limit = row[kLimit];
  row[kCoefficient] = norm == 0 || !(limit >= 0) ? 1 : clip_coefficient(limit, norm);
}

// Applies any policy but a percentile, whose state needs many threads; leaves coefficient and limit in the
// row.
STEADYGRAD_INLINE void apply_policy(const ClipPolicy& policy, double* row, double norm, double total,
                                    bool learns) {
  if (policy.kind == PolicyKind::adaptive) row[kLimit] = NAN;
  if (policy.kind == PolicyKind::given || policy.kind == PolicyKind::adaptive) return apply_given(row, norm);
  const bool enters = learns && is_entered(norm);
  double coefficient = 1;
  if (policy.kind == PolicyKind::zscore) {
    row[kLimit] = zscore_limit(policy, row, norm, enters);
    coefficient = clip_coefficient(row[kLimit], norm);
  } else if (policy.kind == PolicyKind::relative) {
    coefficient = relative_coefficient(policy, row, norm, total, enters);
  } else if (policy.kind == PolicyKind::damp) {
    row[kLimit] = policy.max_norm;
    coefficient = damping(policy, norm);
  }
  row[kCoefficient] = norm == 0 ? 1 : coefficient;
}

// Returns a count or place of a percentile's row, at most `most`, so that a malformed row cannot make kernels
// read other memory.
STEADYGRAD_INLINE int64_t whole_number(double number, int64_t most) {
  if (!(number > 0)) return 0;
  return number < static_cast<double>(most) ? static_cast<int64_t>(number) : most;
}

// The place of a norm among the sorted ones, and the range that moves by one place for it.
struct Insertion {
  int64_t place;
  int64_t begin;
  int64_t end;
  int direction;  // +1: to the right
};

// Returns how many of the sorted numbers are less.
STEADYGRAD_INLINE int64_t rank_among(const double* sorted, int64_t count, double norm) {
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < norm) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

STEADYGRAD_INLINE Insertion insertion_of(const double* row, int64_t window, double norm) {
  const int64_t count = whole_number(row[kCount], window);
  const double* const sorted = row + kNorms + window;
  const int64_t place = rank_among(sorted, count, norm);
  if (count < window) return {place, place, count, 1};
  const int64_t oldest = whole_number(row[kOldest], window - 1);
  // In a malformed row the search may find nothing, so the last place is the limit.
  const int64_t leaves =
      whole_number(static_cast<double>(rank_among(sorted, count, row[kNorms + oldest])), count - 1);
  if (place <= leaves) return {place, place, leaves, 1};
  return {place - 1, leaves + 1, place, -1};
}

// Puts a norm into the ring that holds the order of steps; the sorted norms have already moved.
STEADYGRAD_INLINE void enter(double* row, int64_t window, double norm) {
  const int64_t oldest = whole_number(row[kOldest], window - 1);
  row[kNorms + oldest] = norm;
  row[kOldest] = static_cast<double>(oldest + 1 == window ? 0 : oldest + 1);
  if (row[kCount] < static_cast<double>(window)) row[kCount] += 1;
}

// Interpolates between two neighbours like numpy.percentile; without a history there is no limit.
STEADYGRAD_INLINE double percentile_of(const double* row, int64_t window, double level) {
  const int64_t count = whole_number(row[kCount], window);
  if (count == 0) return INFINITY;
  const double* const sorted = row + kNorms + window;
  const double index = level * static_cast<double>(count - 1);
  const int64_t lower = static_cast<int64_t>(index);
  if (lower + 1 >= count) return sorted[count - 1];
  const double weight = index - static_cast<double>(lower);
  const double difference = sorted[lower + 1] - sorted[lower];
  return weight < 0.5 ? sorted[lower] + difference * weight : sorted[lower + 1] - difference * (1 - weight);
}

STEADYGRAD_INLINE void limit_to_percentile(const ClipPolicy& policy, double* row, double norm) {
  row[kLimit] = percentile_of(row, policy.window, policy.level);
  row[kCoefficient] = norm == 0 ? 1 : clip_coefficient(row[kLimit], norm);
}

STEADYGRAD_INLINE bool judges_spikes(const SpikePolicy& policy, const double* row) {
  const int64_t half = policy.window / 2;
  return row[kCount] >= static_cast<double>(half > 2 ? half : 2);
}

STEADYGRAD_INLINE bool is_spike(const SpikePolicy& policy, double norm, double mean, double squares,
                                double count) {
  return norm > mean + policy.sigma * std::sqrt(squares / (count - 1));
}

}  // namespace steadygrad
