// Clipping by output unit: the pass between pass 1 and the decision that leaves a coefficient for each unit.
#pragma once

#include <cstdint>
#include <vector>

#include "core/unit_clip.h"
#include "cuda/grad_norm.h"

namespace steadygrad::cuda {

// In device memory; null where a step does not clip by unit.
struct UnitMemory {
  TensorUnits* tensors = nullptr;  // per tensor
  int64_t units = 0;
};

// Lays the tensors' units out where the arena stands and appends their words to the table's image; the
// coefficients follow.
UnitMemory take_unit_memory(const Tensors& tensors, const std::vector<GroupOptions>& groups, Arena& arena,
                            std::vector<uint64_t>& image);

// After pass 1, which brings gradients and groups. Says in table.arrived[1] whether a coefficient is not 1.
void launch_unit_clip(const char* function, const TensorTable& table, const UnitMemory& memory,
                      const StepBroadcast& broadcast, const StepOptions& options, const float* grad_scale,
                      double eps, Stream stream);

// Kernels that clip by unit are compiled for fewer kinds of tensors.
template <class Function>
void with_unit_contents(Contents contents, Function function) {
  if (contents == Contents::float32_contiguous) return function(Elements<Contents::float32_contiguous>{});
  function(Elements<Contents::any>{});
}

}  // namespace steadygrad::cuda
