// Records a step on the CPU in its optimizer's ring.
#pragma once

#include <vector>

#include "core/telemetry.h"
#include "cpu/scope_norms.h"

namespace steadygrad::cpu {

// Records a step that has been decided, after its policies were asked.
void record(const Telemetry& telemetry, const Tensors& tensors, const GradNorms& norms,
            const ScopeNorms& scopes, const std::vector<GroupOptions>& groups, const StepOptions& options,
            const Policies& policies, const Outcome& outcome);

}  // namespace steadygrad::cpu
