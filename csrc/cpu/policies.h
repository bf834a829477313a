// Clip policies on the CPU: they compute the coefficients of a step's scopes, and decide whether its norm is
// a spike.
#pragma once

#include <algorithm>
#include <vector>

#include "core/policy.h"
#include "cpu/scope_norms.h"

namespace steadygrad::cpu {

// Returns whether the step is skipped because of its norm.
bool is_spiked(const Policies& policies, const StepOptions& options, const Norm& total);

// Enters the norm, even of a skipped step, since a lasting rise of the norm must not be skipped for ever.
void enter_spike(const Policies& policies, const StepOptions& options, const Norm& total);

// Asks a policy outside of the kernels, if there is one, for the limits of a step that proceeds.
void ask_policy(const Policies& policies, const StepOptions& options, const Reduction& reduction,
                const ScopeNorms& norms);

// Writes each scope's coefficient to its row, for a step that proceeds.
void apply_policies(const Policies& policies, const StepOptions& options, const Tensors& tensors,
                    const ScopeNorms& norms);

// Returns the policy's coefficient for the scope of a tensor with this group and place.
inline double policy_coefficient(const Policies& policies, const StepOptions& options, int32_t group,
                                 int32_t place) {
  if (policies.clip_rows == nullptr) return 1;
  return policies.clip_rows[scope_of(options.clip_scope, group, place) * row_size(policies.clip)];
}

// Returns the smaller coefficient: a param group's own limit caps the policy's.
inline double step_coefficient(const std::vector<GroupOptions>& groups, const Policies& policies,
                               const StepOptions& options, int32_t group, int32_t place, const Norm& norm) {
  return std::min(scope_coefficient(groups[group], options, norm),
                  policy_coefficient(policies, options, group, place));
}

}  // namespace steadygrad::cpu
