// Between the passes: from the tensors' norms to those of the clip's scopes, over all processes.
#pragma once

#include <vector>

#include "core/scope_sums.h"
#include "cpu/grad_norm.h"

namespace steadygrad::cpu {

struct ScopeNorms {
  Norm total;
  std::vector<Norm> groups;   // where the clip's scope is a group, and with a reduction
  std::vector<Norm> tensors;  // where it is a tensor
  std::vector<Norm> slots;    // with a reduction per tensor: of all that may take part
  bool found_inf = false;     // on any process

  const Norm& of(ClipScope scope, int32_t tensor, int32_t group) const;
};

ScopeNorms scope_norms(const Tensors& tensors, const GradNorms& norms, size_t groups,
                       const StepOptions& options, const Reduction& reduction);

}  // namespace steadygrad::cpu
