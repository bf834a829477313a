// Brings an operand's elements into contiguous memory of the type they are computed in, and back. Most
// operands are that already; strided and half-precision ones go through a buffer that stays in the
// first-level cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/tensors.h"
#include "cpu/vector_kernels.h"

namespace steadygrad::cpu {

// The size of a buffer, a multiple of kLanes; the buffers of all operands of a step fit into the first-level
// cache.
constexpr int64_t kTile = 1024;

inline int64_t size_of(DType dtype) {
  if (dtype == DType::float64) return 8;
  return dtype == DType::float32 ? 4 : 2;
}

// Walks the elements [begin, begin + count) in row-major order of their indices, and calls function(k, offset
// in elements).
template <class Function>
void for_each_offset(const TensorOperands& tensor, const int64_t* strides, int64_t begin, int64_t count,
                     Function function) {
  constexpr int kMaxDims = 64;  // torch's limit
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    index[d] = begin % tensor.sizes[d];
    begin /= tensor.sizes[d];
    offset += index[d] * strides[d];
  }
  for (int64_t k = 0; k < count; ++k) {
    function(k, offset);
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < tensor.sizes[d]) break;
      offset -= strides[d] * tensor.sizes[d];
      index[d] = 0;
    }
  }
}

template <class T>
class Stage {
 public:
  static bool is_direct(const Operand& operand) {
    return operand.strides == nullptr && operand.dtype == DTypeOf<T>::value;
  }

  // Returns the elements themselves if they can be used in place, else a copy in this stage's buffer.
  T* read(const TensorOperands& tensor, const Operand& operand, int64_t begin, int64_t count) {
    char* const base = static_cast<char*>(operand.data);
    const int64_t size = size_of(operand.dtype);
    if (is_direct(operand)) return reinterpret_cast<T*>(base) + begin;
    const char* contiguous = base + begin * size;
    if (operand.strides != nullptr) {
      with_element(operand.dtype, [&](auto element) {
        using Element = decltype(element);
        for_each_offset(tensor, operand.strides, begin, count, [&](int64_t k, int64_t offset) {
          reinterpret_cast<Element*>(gathered_)[k] = reinterpret_cast<const Element*>(base)[offset];
        });
      });
      contiguous = gathered_;
    }
    vector_kernels<T>().load(buffer_, contiguous, operand.dtype, count);
    return buffer_;
  }

  // Writes back what was computed from read()'s result; does nothing if that was the memory itself.
  void write(const TensorOperands& tensor, const Operand& operand, int64_t begin, int64_t count,
             const T* values) {
    if (is_direct(operand)) return;
    char* const base = static_cast<char*>(operand.data);
    if (operand.strides == nullptr) {
      vector_kernels<T>().store(base + begin * size_of(operand.dtype), operand.dtype, values, count);
      return;
    }
    vector_kernels<T>().store(gathered_, operand.dtype, values, count);
    with_element(operand.dtype, [&](auto element) {
      using Element = decltype(element);
      for_each_offset(tensor, operand.strides, begin, count, [&](int64_t k, int64_t offset) {
        reinterpret_cast<Element*>(base)[offset] = reinterpret_cast<const Element*>(gathered_)[k];
      });
    });
  }

  T* buffer() { return buffer_; }

 private:
  // Only the size of elements matters when they are moved.
  template <class Function>
  static void with_element(DType dtype, Function function) {
    switch (size_of(dtype)) {
      case 8:
        return function(uint64_t{});
      case 4:
        return function(uint32_t{});
      default:
        return function(uint16_t{});
    }
  }

  alignas(64) T buffer_[kTile];
  alignas(64) char gathered_[kTile * sizeof(double)];
};

// Calls function(T{}) with the type in which the tensor is computed.
template <class Function>
void with_compute_type(const TensorOperands& tensor, Function function) {
  if (tensor.compute_dtype() == DType::float64) {
    function(double{});
  } else {
    function(float{});
  }
}

}  // namespace steadygrad::cpu
