// Clip policies on the CPU: the coefficients of a step's scopes, and whether its norm is a spike.
#pragma once

#include <algorithm>
#include <vector>

#include "core/policy.h"
#include "cpu/scope_norms.h"

namespace steadygrad::cpu {

// Whether the step is skipped for its norm.
bool is_spiked(const Policies& policies, const StepOptions& options, const Norm& total);

// Enters that norm, also of a skipped step: a lasting rise must not be skipped for ever.
void enter_spike(const Policies& policies, const StepOptions& options, const Norm& total);

// Has the limits of a step that proceeds given, where the policy lives outside.
void ask_policy(const Policies& policies, const StepOptions& options, const Reduction& reduction,
                const ScopeNorms& norms);

// Leaves each scope's coefficient in its row, for a step that proceeds.
void apply_policies(const Policies& policies, const StepOptions& options, const Tensors& tensors,
                    const ScopeNorms& norms);

// Of the scope that a tensor of this group and place is in.
inline double policy_coefficient(const Policies& policies, const StepOptions& options, int32_t group,
                                 int32_t place) {
  if (policies.clip_rows == nullptr) return 1;
  return policies.clip_rows[scope_of(options.clip_scope, group, place) * row_size(policies.clip)];
}

// The smaller of both: a param group's own limit is a cap on the policy's.
inline double step_coefficient(const std::vector<GroupOptions>& groups, const Policies& policies,
                               const StepOptions& options, int32_t group, int32_t place, const Norm& norm) {
  return std::min(scope_coefficient(groups[group], options, norm),
                  policy_coefficient(policies, options, group, place));
}

}  // namespace steadygrad::cpu
