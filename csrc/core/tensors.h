// The tensors of one call as a backend sees them: pointers, sizes, strides, and the chunks into which they
// are cut.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace steadygrad {

constexpr int kMaxStates = 3;

// `strides` is null if the elements are in memory order, which all operands of the tensor share.
struct Operand {
  void* data = nullptr;
  const int64_t* strides = nullptr;
  DType dtype = DType::float32;
};

// A parameter with its gradient and optimizer state; operands that an operation does not use are empty.
struct TensorOperands {
  int64_t numel = 0;
  const int64_t* sizes = nullptr;
  int32_t ndim = 0;
  int32_t group = 0;
  int32_t place = 0;  // the parameter's place in the order of the param groups
  Operand param;
  Operand grad;
  Operand states[kMaxStates];
  Operand extra;  // kept beside the parameter (core/param_storage.h)

  // Arithmetic is in fp64 for fp64 and in fp32 for everything else.
  STEADYGRAD_INLINE DType compute_dtype() const {
    const DType stored = param.data != nullptr ? param.dtype : grad.dtype;
    return stored == DType::float64 ? DType::float64 : DType::float32;
  }
};

// A number in memory of the tensors' device, such as a step counter, in fp32 or fp64; data is null if there
// is none.
struct Number {
  void* data = nullptr;
  DType dtype = DType::float32;

  STEADYGRAD_INLINE double value() const {
    return dtype == DType::float64 ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }

  STEADYGRAD_INLINE void set(double value) const {
    if (dtype == DType::float64) {
      *static_cast<double*>(data) = value;
    } else {
      *static_cast<float*>(data) = static_cast<float>(value);
    }
  }
};

// The size of a chunk, an equal piece of work. The order of sums follows from these chunks alone
// (core/norm.h).
constexpr int64_t kChunk = 8192;

struct Chunk {
  int32_t tensor;
  int32_t count;
  int64_t begin;
};

}  // namespace steadygrad
