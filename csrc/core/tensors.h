// What a backend is told about the tensors of one call: pointers, sizes, strides, and the chunks they are cut
// into.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace steadygrad {

constexpr int kMaxStates = 3;

// `strides` is null when the elements lie in memory order, shared with every other operand of the tensor.
struct Operand {
  void* data = nullptr;
  const int64_t* strides = nullptr;
  DType dtype = DType::float32;
};

// One parameter with its gradient and optimizer state; an operand that an operation does not use stays empty.
struct TensorOperands {
  int64_t numel = 0;
  const int64_t* sizes = nullptr;
  int32_t ndim = 0;
  int32_t group = 0;
  int32_t place = 0;  // of the parameter, in the order of the param groups
  Operand param;
  Operand grad;
  Operand states[kMaxStates];
  Operand extra;  // kept beside the parameter (core/param_storage.h)

  // fp64 is computed in fp64, everything else in fp32.
  STEADYGRAD_INLINE DType compute_dtype() const {
    const DType stored = param.data != nullptr ? param.dtype : grad.dtype;
    return stored == DType::float64 ? DType::float64 : DType::float32;
  }
};

// A number that lies in memory of the tensors' device, such as a step counter, in fp32 or fp64; without data
// there is none.
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

// Equal pieces of work. The order in which sums are formed follows from this table alone (core/norm.h).
constexpr int64_t kChunk = 8192;

struct Chunk {
  int32_t tensor;
  int32_t count;
  int64_t begin;
};

}  // namespace steadygrad
