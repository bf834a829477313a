// The inner loops. vector_kernels.cpp is compiled once per instruction set, and only this table is visible
// outside of it.
#pragma once

#include <cstdint>

#include "core/gradient.h"
#include "core/norm.h"
#include "core/param_storage.h"
#include "core/rules/hyper.h"
#include "core/tensors.h"

namespace steadygrad::cpu {

// The partial sums of one chunk, one per lane (core/norm.h).
struct NormLanes {
  alignas(64) double small[kLanes];
  alignas(64) double medium[kLanes];
  alignas(64) double large[kLanes];
};

// Contiguous elements of one tensor in the type in which they are computed.
template <class T>
struct Tile {
  int64_t count;
  T* param;
  const T* grad;
  T* states[kMaxStates];
};

struct RuleStep {
  RuleKind kind;
  RuleHyper hyper;
  StepScalars scalars;
};

template <class T>
struct VectorKernels {
  void (*load)(T* out, const void* in, DType dtype, int64_t count);
  void (*store)(void* out, DType dtype, const T* in, int64_t count);
  // Adds `count` elements to the lanes; all calls for a chunk, except the last one, have a multiple of
  // kLanes.
  void (*accumulate_norm)(NormLanes& lanes, const T* in, int64_t count, NormType type, double scale);
  void (*count_nonfinite)(const T* in, int64_t count, int64_t& nonfinite, int64_t& nan);
  void (*zero_nonfinite)(T* out, const T* in, int64_t count);
  void (*before_clip)(T* out, const T* grad, const T* param, int64_t count,
                      const GradientTransform<T>& transform);
  void (*transform)(T* out, const T* grad, const T* param, int64_t count,
                    const GradientTransform<T>& transform);
  void (*soft_threshold)(T* param, int64_t count, T amount);
  // Applies the rule to scale(grad).
  void (*update)(const Tile<T>& tile, const RuleStep& rule, const ScaleFactors<T>& scale);
  // join() replaces parameters by the values that they represent together with `extra`, and split() does the
  // reverse. `first` is the place of the tile's first element in its chunk.
  void (*join)(T* param, const T* extra, int64_t count, const ParamStorage& storage);
  void (*split)(T* value, T* extra, int64_t first, int64_t count, const ParamStorage& storage);
};

// Returns the kernels of the instruction set in use.
template <class T>
const VectorKernels<T>& vector_kernels();

// Returns "baseline", "avx2" or "avx512": the widest set that this processor has, or the one that the
// environment variable STEADYGRAD_INSTRUCTION_SET names (for tests).
const char* instruction_set();

}  // namespace steadygrad::cpu
