#include "cpu/telemetry.h"

#include "cpu/policies.h"

namespace steadygrad::cpu {
namespace {

double norm_of_norms(NormType type, const std::vector<double>& norms) {
  double extreme = 0;
  for (const double norm : norms) extreme = norm > extreme || norm != norm ? norm : extreme;
  if (type.kind == NormKind::infinity || !(extreme > 0) || !is_finite(extreme)) return extreme;
  double lanes[kLanes];
  const double powers = combine_in_order<double>(
      static_cast<int64_t>(norms.size()), lanes,
      [&](int64_t i) { return relative_power(type, norms[i] / extreme); },
      [](double& a, double b) { a += b; });
  return relative_root(type, extreme, powers);
}

// Returns the norm of all gradients, each scaled by its scope's coefficient.
double clipped_norm(const Tensors& tensors, const GradNorms& norms, const ScopeNorms& scopes,
                    const std::vector<GroupOptions>& groups, const StepOptions& options,
                    const Policies& policies, const std::vector<bool>& has_group) {
  const auto coefficient = [&](size_t group, int32_t place, const Norm& norm) {
    return step_coefficient(groups, policies, options, static_cast<int32_t>(group), place, norm);
  };
  std::vector<double> clipped;
  if (options.clip_scope == ClipScope::tensor) {
    std::vector<double> coefficients(scopes.slots.size(),
                                     1.0);  // 1 for tensors that only other processes have
    for (size_t t = 0; t < tensors.size(); ++t) {
      const Norm& norm = scopes.tensors[t];
      const double chosen = coefficient(tensors[t].group, tensors[t].place, norm);
      if (scopes.slots.empty()) {
        clipped.push_back(chosen * seen_norm(options, norm));
      } else {
        coefficients[tensors[t].place] = chosen;
      }
    }
    for (size_t s = 0; s < scopes.slots.size(); ++s) {
      clipped.push_back(coefficients[s] * seen_norm(options, scopes.slots[s]));
    }
    return norm_of_norms(options.norm_type, clipped);
  }
  const bool global = options.clip_scope == ClipScope::global;
  double first = 1;
  bool found = false;
  bool alike = global;
  for (size_t g = 0; g < groups.size() && alike; ++g) {
    if (!has_group[g]) continue;
    const double chosen = coefficient(g, 0, scopes.total);
    alike = !found || chosen == first;
    first = chosen;
    found = true;
  }
  if (alike) return first * seen_norm(options, scopes.total);
  const auto group_norm = [&](int64_t g) {
    if (!scopes.groups.empty()) return scopes.groups[g];
    return norms.over([&](size_t t) { return tensors[t].group == static_cast<int32_t>(g); });
  };
  return norm_in_turn(options.norm_type, static_cast<int64_t>(groups.size()), [&](int64_t g) {
    if (!has_group[g]) return 0.0;
    const Norm norm = group_norm(g);
    return coefficient(g, 0, global ? scopes.total : norm) * seen_norm(options, norm);
  });
}

// Returns which groups have elements on any process.
std::vector<bool> groups_with_elements(const Tensors& tensors, const ScopeNorms& scopes, size_t groups) {
  std::vector<bool> found(groups);
  for (const TensorOperands& tensor : tensors) {
    if (tensor.numel > 0) found[tensor.group] = true;
  }
  for (size_t g = 0; g < scopes.groups.size(); ++g) found[g] = found[g] || scopes.groups[g].norm > 0;
  return found;
}

}  // namespace

void record(const Telemetry& telemetry, const Tensors& tensors, const GradNorms& norms,
            const ScopeNorms& scopes, const std::vector<GroupOptions>& groups, const StepOptions& options,
            const Policies& policies, const Outcome& outcome) {
  RecordedStep step;
  step.total = scopes.total;
  step.flags = (outcome.clipped != 0 ? kRecordedClipped : 0) | (outcome.skipped != 0 ? kRecordedSkipped : 0) |
               (outcome.refused != 0 ? kRecordedRefused : 0) | (outcome.spiked != 0 ? kRecordedSpiked : 0);
  const std::vector<bool> has_group = groups_with_elements(tensors, scopes, groups.size());
  if (has_clipped_norm(step, policies)) {
    step.clipped_norm = clipped_norm(tensors, norms, scopes, groups, options, policies, has_group);
  }
  step.limit = total_limit(policies, groups.data(), static_cast<int32_t>(groups.size()), options,
                           is_taken(step), [&](int32_t g) { return has_group[g]; });
  double* const row = next_row(telemetry);
  record_totals(row, options, step);
  const auto record_norm = [&](int64_t place, const Norm& norm) {
    record_parameter(telemetry, row, place, norm.norm, static_cast<double>(norm.nonfinite));
  };
  if (telemetry.parameters > 0 && !scopes.slots.empty()) {
    for (size_t s = 0; s < scopes.slots.size(); ++s) record_norm(static_cast<int64_t>(s), scopes.slots[s]);
  } else if (telemetry.parameters > 0) {
    for (int64_t p = 0; p < telemetry.parameters; ++p) record_parameter(telemetry, row, p, NAN, 0);
    for (size_t t = 0; t < tensors.size(); ++t) record_norm(tensors[t].place, norms.of(t));
  }
  *telemetry.recorded += 1;
}

}  // namespace steadygrad::cpu
