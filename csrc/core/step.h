// The options of a step and its decisions, for every backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/gradient.h"
#include "core/norm.h"
#include "core/param_storage.h"
#include "core/rules/hyper.h"
#include "core/tensors.h"

namespace steadygrad {

enum class ClipScope : uint8_t { global, group, tensor };
enum class NonfinitePolicy : uint8_t { skip, zero, raise, propagate };

struct GroupOptions {
  RuleHyper hyper;
  double max_norm = INFINITY;  // with infinity the norm is computed but nothing is clipped
  double clip_value = INFINITY;
  double l1 = 0;
  double l2 = 0;
  double clipping = INFINITY;  // limit of the group's output units, relative to their norms
  Number lr;                   // replaces hyper.lr if it has data; for asynchronous backends
};

struct StepOptions {
  RuleKind rule = RuleKind::none;
  NormType norm_type;
  ClipScope clip_scope = ClipScope::global;
  NonfinitePolicy nonfinite = NonfinitePolicy::skip;
  bool penalty_before_clip = true;
  bool proximal = false;
  bool write_grads = false;
  double unscale = 1;  // 1 / grad_scale
  bool found_inf = false;
  Rounding rounding = Rounding::nearest;
  uint64_t rounding_seed = 0;
  uint64_t rounded_steps = 0;  // steps taken before this one
};

// Returns a group's transform without its clip coefficient.
STEADYGRAD_INLINE TransformOptions group_transform(const GroupOptions& group, const StepOptions& options) {
  TransformOptions transform;
  const double l1 = options.proximal ? 0 : group.l1;
  transform.unscale = options.unscale;
  (options.penalty_before_clip ? transform.l1_before_clip : transform.l1_after_clip) = l1;
  (options.penalty_before_clip ? transform.l2_before_clip : transform.l2_after_clip) = group.l2;
  transform.clip_value = group.clip_value;
  return transform;
}

STEADYGRAD_INLINE bool is_skipped(const StepOptions& options, const Norm& total) {
  return options.found_inf || (total.nonfinite > 0 && options.nonfinite == NonfinitePolicy::skip);
}

STEADYGRAD_INLINE bool is_refused(const StepOptions& options, const Norm& total) {
  return !is_skipped(options, total) && total.nonfinite > 0 && options.nonfinite == NonfinitePolicy::raise;
}

STEADYGRAD_INLINE bool zeroes_nonfinite(const StepOptions& options, const Norm& total) {
  return total.nonfinite > 0 && options.nonfinite == NonfinitePolicy::zero;
}

// Returns the norm that the clip looks at; the "zero" policy leaves out non-finite elements.
STEADYGRAD_INLINE double seen_norm(const StepOptions& options, const Norm& scope) {
  return options.nonfinite == NonfinitePolicy::zero ? scope.finite_norm : scope.norm;
}

STEADYGRAD_INLINE double scope_coefficient(const GroupOptions& group, const StepOptions& options,
                                           const Norm& scope) {
  if (group.max_norm == INFINITY) return 1;
  return clip_coefficient(group.max_norm, seen_norm(options, scope));
}

// Returns the index of a tensor's scope.
STEADYGRAD_INLINE int64_t scope_of(ClipScope scope, int32_t group, int32_t place) {
  return scope == ClipScope::global ? 0 : scope == ClipScope::group ? group : place;
}

STEADYGRAD_INLINE ParamStorage param_storage(const StepOptions& options, const TensorOperands& tensor,
                                             const Chunk& chunk) {
  ParamStorage storage;
  if (!is_half(tensor.param.dtype)) return storage;
  storage.rounding = options.rounding;
  storage.dtype = tensor.param.dtype;
  if (options.rounding == Rounding::stochastic) {
    storage.random = random_key(options.rounding_seed, options.rounded_steps, tensor.place, chunk.begin);
  }
  return storage;
}

// Returns what the proximal step subtracts from every magnitude after the update; 0 if there is no proximal
// step.
STEADYGRAD_INLINE double proximal_threshold(const GroupOptions& group, const StepOptions& options) {
  return options.proximal ? group.hyper.lr * group.l1 : 0;
}

}  // namespace steadygrad
