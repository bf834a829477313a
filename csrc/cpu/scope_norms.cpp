#include "cpu/scope_norms.h"

#include <algorithm>

namespace steadygrad::cpu {
namespace {

void fill_rows(const Tensors& tensors, const GradNorms& norms, size_t groups, const StepOptions& options,
               const Reduction& reduction) {
  const auto counted = [&](size_t t) { return reduction.counted[tensors[t].place] != 0; };
  ScopeSums& flags = reduction.rows[0];
  flags = ScopeSums();
  flags.medium = options.found_inf ? 1 : 0;
  for (size_t t = 0; t < tensors.size(); ++t) flags.nonfinite += static_cast<double>(norms.nonfinite(t));
  ScopeSums* const group_rows = reduction.rows + 1;
  for (size_t g = 0; g < groups; ++g) {
    group_rows[g] =
        norms.sums_over([&](size_t t) { return counted(t) && tensors[t].group == static_cast<int32_t>(g); });
  }
  if (!reduction.per_tensor) return;
  ScopeSums* const tensor_rows = group_rows + groups;
  std::fill_n(tensor_rows, reduction.slots, no_sums(options.norm_type));
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (counted(t)) tensor_rows[tensors[t].place] = norms.sums_of_one(t);
  }
}

ScopeNorms reduced_norms(const Tensors& tensors, size_t groups, const StepOptions& options,
                         const Reduction& reduction) {
  const NormType type = options.norm_type;
  const ScopeSums& flags = reduction.rows[0];
  const ScopeSums* const group_rows = reduction.rows + 1;
  ScopeNorms scopes;
  scopes.found_inf = flags.medium > 0;
  scopes.total = with_flags(norm_of(type, combined_sums(type, group_rows, groups)), flags);
  for (size_t g = 0; g < groups; ++g) scopes.groups.push_back(norm_of(type, group_rows[g]));
  if (reduction.per_tensor) {
    for (int32_t s = 0; s < reduction.slots; ++s)
      scopes.slots.push_back(norm_of(type, group_rows[groups + s]));
  }
  if (options.clip_scope == ClipScope::tensor) {
    for (const TensorOperands& tensor : tensors) scopes.tensors.push_back(scopes.slots[tensor.place]);
  }
  return scopes;
}

}  // namespace

const Norm& ScopeNorms::of(ClipScope scope, int32_t tensor, int32_t group) const {
  switch (scope) {
    case ClipScope::tensor:
      return tensors[tensor];
    case ClipScope::group:
      return groups[group];
    case ClipScope::global:
      break;
  }
  return total;
}

ScopeNorms scope_norms(const Tensors& tensors, const GradNorms& norms, size_t groups,
                       const StepOptions& options, const Reduction& reduction) {
  if (reduction.rows != nullptr) {
    fill_rows(tensors, norms, groups, options, reduction);
    reduction.reduce();
    return reduced_norms(tensors, groups, options, reduction);
  }
  ScopeNorms scopes;
  scopes.found_inf = options.found_inf;
  scopes.total = norms.total();
  if (options.clip_scope == ClipScope::group) {
    for (size_t g = 0; g < groups; ++g) {
      scopes.groups.push_back(
          norms.over([&](size_t t) { return tensors[t].group == static_cast<int32_t>(g); }));
    }
  } else if (options.clip_scope == ClipScope::tensor) {
    for (size_t t = 0; t < tensors.size(); ++t) scopes.tensors.push_back(norms.of(t));
  }
  return scopes;
}

}  // namespace steadygrad::cpu
