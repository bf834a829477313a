#include "cpu/policies.h"

#include <algorithm>

namespace steadygrad::cpu {
namespace {

void enter_sorted(double* row, int64_t window, double norm) {
  double* const sorted = row + kNorms + window;
  const Insertion at = insertion_of(row, window, norm);
  if (at.direction > 0) {
    std::copy_backward(sorted + at.begin, sorted + at.end, sorted + at.end + 1);
  } else {
    std::copy(sorted + at.begin, sorted + at.end, sorted + at.begin - 1);
  }
  sorted[at.place] = norm;
  enter(row, window, norm);
}

}  // namespace

bool is_spiked(const Policies& policies, const StepOptions& options, const Norm& total) {
  const double norm = seen_norm(options, total);
  const double* const row = policies.skip_row;
  if (row == nullptr || !is_entered(norm) || !judges_spikes(policies.skip, row)) return false;
  const double count = static_cast<double>(whole_number(row[kCount], policies.skip.window));
  double lanes[kLanes] = {};
  const auto sum = [&](auto term) {
    return combine_in_order(
        static_cast<int64_t>(count), lanes, [&](int64_t i) { return term(row[kNorms + i]); },
        [](double& a, double b) { a += b; });
  };
  const double mean = sum([](double x) { return x; }) / count;
  const double squares = sum([&](double x) { return (x - mean) * (x - mean); });
  return is_spike(policies.skip, norm, mean, squares, count);
}

void enter_spike(const Policies& policies, const StepOptions& options, const Norm& total) {
  const double norm = seen_norm(options, total);
  if (policies.skip_row != nullptr && is_entered(norm)) enter(policies.skip_row, policies.skip.window, norm);
}

void ask_policy(const Policies& policies, const StepOptions& options, const Reduction& reduction,
                const ScopeNorms& norms) {
  if (!reduction.ask_policy || policies.clip_rows == nullptr) return;
  const auto leave = [&](size_t scope, const Norm& norm) {
    policies.clip_rows[scope * row_size(policies.clip) + kGivenNorm] = seen_norm(options, norm);
  };
  if (options.clip_scope == ClipScope::global) {
    leave(0, norms.total);
  } else {
    const std::vector<Norm>& all = options.clip_scope == ClipScope::group ? norms.groups : norms.slots;
    for (size_t scope = 0; scope < all.size(); ++scope) leave(scope, all[scope]);
  }
  reduction.ask_policy();
}

void apply_policies(const Policies& policies, const StepOptions& options, const Tensors& tensors,
                    const ScopeNorms& norms) {
  if (policies.clip_rows == nullptr) return;
  const ClipPolicy& policy = policies.clip;
  const double total = seen_norm(options, norms.total);
  const bool learns = is_finite(total);
  const auto apply = [&](size_t scope, const Norm& of_scope) {
    double* const row = policies.clip_rows + scope * row_size(policy);
    const double norm = seen_norm(options, of_scope);
    if (policy.kind != PolicyKind::percentile) return apply_policy(policy, row, norm, total, learns);
    if (learns && is_entered(norm)) enter_sorted(row, policy.window, norm);
    limit_to_percentile(policy, row, norm);
  };
  if (options.clip_scope == ClipScope::global) {
    apply(0, norms.total);
  } else if (options.clip_scope == ClipScope::group) {
    for (size_t g = 0; g < norms.groups.size(); ++g) apply(g, norms.groups[g]);
  } else if (!norms.slots.empty()) {
    // This includes tensors whose gradients only other processes have, so that all processes keep the same
    // state.
    for (size_t s = 0; s < norms.slots.size(); ++s) apply(s, norms.slots[s]);
  } else {
    for (size_t t = 0; t < tensors.size(); ++t) apply(tensors[t].place, norms.tensors[t]);
  }
}

}  // namespace steadygrad::cpu
