// Pass 1 as the other operations launch it: partial norms of every chunk.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/lanes.h"
#include "cuda/tensor_table.h"

namespace steadygrad::cuda {

// What follows from the chunks of one call: device memory of every later kernel.
struct NormMemory {
  ChunkPartials chunks;
  NormPartial* tensors = nullptr;  // per tensor
  double* scales = nullptr;        // per tensor, for a general p; else null
};

NormMemory take_norm_memory(const TensorTable& table, NormType type, Arena& arena);

// What pass 1 brings to the device, where pass 2 finds it.
struct StepBroadcast {
  GroupOptions* groups = nullptr;
  void** grads = nullptr;
};

// One launch, or several where the arguments do not fit one. `groups` and `grads` are those of a step, per
// param group and per tensor; functions leave them empty.
void launch_grad_norm(const char* function, const Tensors& tensors, const TensorTable& table,
                      const NormMemory& memory, const StepOptions& options, const float* grad_scale,
                      const std::vector<GroupOptions>& groups, const StepBroadcast& broadcast, Stream stream);

}  // namespace steadygrad::cuda
