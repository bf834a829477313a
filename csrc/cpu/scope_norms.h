// Computes the norms of the clip's scopes from the tensors' norms, between the passes and over all processes.
#pragma once

#include <vector>

#include "core/scope_sums.h"
#include "cpu/grad_norm.h"

namespace steadygrad::cpu {

struct ScopeNorms {
  Norm total;
  std::vector<Norm> groups;   // if the clip's scope is a group, and with a reduction
  std::vector<Norm> tensors;  // if the clip's scope is a tensor
  std::vector<Norm> slots;    // with a reduction per tensor: the norms of all tensors that may take part
  bool found_inf = false;     // whether any process has found it

  const Norm& of(ClipScope scope, int32_t tensor, int32_t group) const;
};

ScopeNorms scope_norms(const Tensors& tensors, const GradNorms& norms, size_t groups,
                       const StepOptions& options, const Reduction& reduction);

}  // namespace steadygrad::cpu
