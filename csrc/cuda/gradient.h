// Gradients transformed in place, and what pass 2 applies to each tensor.
#pragma once

#include "core/unit_clip.h"
#include "cuda/step/decide.h"

namespace steadygrad::cuda {

constexpr int kChunkThreads = 128;

// Pass 2 walks backwards: what pass 1 read last is still in cache.
__device__ __forceinline__ Chunk backward_chunk(const TensorTable& table, int32_t index) {
  return table.chunk(table.chunks - 1 - index);
}

// Where a tensor's transform comes from: a step's decision, or the same options for all tensors.
struct TransformSource {
  const Decision* decision = nullptr;
  const double* coefficients = nullptr;  // per tensor or per group, as options.clip_scope says
  const GroupOptions* groups = nullptr;
  StepOptions options;
  TransformOptions fixed;
  Number total_norm;  // with max_norm: the clip coefficient, if there is no decision
  double max_norm = INFINITY;
  const TensorUnits* units = nullptr;  // per tensor, where a step clips by unit

  __device__ __forceinline__ bool proceeds() const { return decision == nullptr || decision->proceed; }

  __device__ __forceinline__ TransformOptions of(const Chunk& chunk, int32_t group) const {
    TransformOptions transform = fixed;
    if (decision != nullptr) {
      StepOptions unscaled = options;
      unscaled.unscale = decision->unscale;
      transform = group_transform(groups[group], unscaled);
      transform.zero_nonfinite = decision->zero_nonfinite;
      transform.clip_coefficient =
          coefficients[options.clip_scope == ClipScope::tensor ? chunk.tensor : group];
    } else if (total_norm.data != nullptr) {
      transform.clip_coefficient = clip_coefficient(max_norm, total_norm.value());
    }
    return transform;
  }

  template <class T>
  __device__ __forceinline__ UnitTransform<T> by_unit(const Chunk& chunk, int32_t group) const {
    return unit_transform<T>(of(chunk, group), units[chunk.tensor]);
  }
};

// `only_clips`: the decision's coefficients are all that could change a gradient.
void launch_transform(const char* function, const TensorTable& table, void* const* grads,
                      const TransformSource& source, bool only_clips, Stream stream);

}  // namespace steadygrad::cuda
