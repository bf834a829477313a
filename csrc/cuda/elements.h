// Reading and writing elements in the type they are computed in: four at a time where they lie in memory
// order and are aligned, one at a time everywhere else. csrc/cuda/step/octets.h has eight at a time.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "core/param_storage.h"
#include "core/tensors.h"

namespace steadygrad::cuda {

constexpr int kQuad = 4;

// The operand's elements. An address that comes from memory might be one of any kind: told that it is one of
// global memory, the compiler needs not ask with each access.
template <class Element>
__device__ __forceinline__ Element* elements_of(const Operand& operand) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(operand.data));
#endif
  return static_cast<Element*>(operand.data);
}

__device__ __forceinline__ float to_compute(float value) { return value; }
__device__ __forceinline__ double to_compute(double value) { return value; }
__device__ __forceinline__ float to_compute(BFloat16 value) { return to_float(value); }
__device__ __forceinline__ float to_compute(Float16 value) { return to_float(value); }

template <class Element, class T>
__device__ __forceinline__ Element to_stored(T value) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    return to_bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<Element, Float16>) {
    return to_float16(static_cast<float>(value));
  } else {
    return static_cast<Element>(value);
  }
}

// Calls function(Element{}) with the type that `dtype` names.
template <class Function>
__device__ __forceinline__ void with_element(DType dtype, Function function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::float64:
      return function(double{});
    case DType::bfloat16:
      return function(BFloat16{});
    case DType::float16:
      return function(Float16{});
  }
}

// Sizes are followed by their reciprocals, 2^64 / size: a 64-bit division is a call that costs registers.
__device__ __forceinline__ int64_t element_offset(const TensorOperands& tensor, const int64_t* strides,
                                                  int64_t index) {
  if (strides == nullptr) return index;
  int64_t offset = 0;
  uint64_t left = static_cast<uint64_t>(index);
#pragma unroll 1  // it is inlined for every operand
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    const uint64_t size = static_cast<uint64_t>(tensor.sizes[d]);
    const uint64_t reciprocal = static_cast<uint64_t>(tensor.sizes[tensor.ndim + d]);
    uint64_t quotient = static_cast<uint64_t>(static_cast<unsigned __int128>(left) * reciprocal >> 64);
    uint64_t remainder = left - quotient * size;
    if (remainder >= size) {  // the quotient is at most one too small
      remainder -= size;
      ++quotient;
    }
    offset += static_cast<int64_t>(remainder) * strides[d];
    left = quotient;
  }
  return offset;
}

// As much of four elements as one access takes: 16 bytes at most.
template <class Element>
struct alignas(sizeof(Element) * kQuad > 16 ? 16 : sizeof(Element) * kQuad) Quad {
  Element values[kQuad];
};

// Whether the operand holds this type, in memory order. Where it begins is another question.
template <class Element>
STEADYGRAD_INLINE bool is_contiguous(const Operand& operand) {
  return operand.strides == nullptr && operand.dtype == DTypeOf<Element>::value;
}

// Whether four elements can be accessed at once.
template <class Element>
STEADYGRAD_INLINE bool is_aligned(const Operand& operand) {
  return reinterpret_cast<uintptr_t>(operand.data) % alignof(Quad<Element>) == 0;
}

template <class T, class Element>
__device__ __forceinline__ void load_quad(const Element* from, T (&to)[kQuad]) {
  const Quad<Element> quad = *reinterpret_cast<const Quad<Element>*>(from);
#pragma unroll
  for (int k = 0; k < kQuad; ++k) to[k] = to_compute(quad.values[k]);
}

template <class T, class Element>
__device__ __forceinline__ void store_quad(Element* to, const T (&from)[kQuad]) {
  Quad<Element> quad;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) quad.values[k] = to_stored<Element>(from[k]);
  *reinterpret_cast<Quad<Element>*>(to) = quad;
}

// Four elements of two or four bytes as they lie in memory. The loads of several operands, whose types
// differ, are under way together when none is converted before all are issued.
struct RawQuad {
  uint32_t words[kQuad];
};

STEADYGRAD_INLINE bool is_quad(const Operand& operand) {
  if (operand.strides != nullptr || operand.dtype == DType::float64) return false;
  return is_half(operand.dtype) ? is_aligned<BFloat16>(operand) : is_aligned<float>(operand);
}

__device__ __forceinline__ RawQuad load_raw(const Operand& operand, int64_t index) {
  RawQuad raw;
  if (is_half(operand.dtype)) {
    const uint2 words = *reinterpret_cast<const uint2*>(elements_of<const uint16_t>(operand) + index);
    raw = {{words.x, words.y, 0, 0}};
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(elements_of<const uint32_t>(operand) + index);
    raw = {{words.x, words.y, words.z, words.w}};
  }
  return raw;
}

// The type is looked at once for all four.
__device__ __forceinline__ void convert(const RawQuad& raw, DType dtype, float (&to)[kQuad]) {
  const auto half = [&](int k) { return static_cast<uint16_t>(raw.words[k / 2] >> (k % 2 * 16)); };
  if (dtype == DType::bfloat16) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) to[k] = to_float(BFloat16{half(k)});
  } else if (dtype == DType::float16) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) to[k] = to_float(Float16{half(k)});
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) to[k] = bit_cast<float>(raw.words[k]);
  }
}

// What the tensors of a call hold: fp32 in memory order alone, anything but fp64, or anything. The first, and
// most usual, has kernels of its own, since code for the others takes registers from it. Where a tensor
// begins plays no part in this: each chunk chooses for itself, so that a tensor that is not aligned costs
// the others nothing.
enum class Contents : uint8_t { float32_contiguous, no_float64, any };

template <Contents kContents>
struct Elements {
  // Times 256 threads, how many a multiprocessor is to hold at least; fp64 code takes the registers of both.
  static constexpr int kBlocks = kContents == Contents::any ? 1 : kContents == Contents::no_float64 ? 2 : 3;

  // Whether anything but fp32 occurs, and whether fp64 does.
  static constexpr bool kMixed = kContents != Contents::float32_contiguous;
  static constexpr bool kFloat64 = kContents == Contents::any;

  // Calls function(T{}) with the type that a tensor is computed in.
  template <class Function>
  __device__ __forceinline__ static void with_compute_type(const TensorOperands& tensor, Function function) {
    if constexpr (kContents == Contents::any) {
      if (tensor.compute_dtype() == DType::float64) return function(double{});
    }
    function(float{});
  }

  // Calls attempt(Element{}) with each stored type that has loops of its own; it says whether it took it.
  template <class T, class Attempt>
  __device__ __forceinline__ static bool with_stored_type(Attempt attempt) {
    if (attempt(T{})) return true;
    if constexpr (kContents != Contents::float32_contiguous && sizeof(T) == sizeof(float)) {
      return attempt(BFloat16{}) || attempt(Float16{});
    }
    return false;
  }

  template <class Element>
  __device__ __forceinline__ static bool contiguous(const Operand& operand) {
    return kContents == Contents::float32_contiguous || is_contiguous<Element>(operand);
  }

  template <class Element>
  __device__ __forceinline__ static bool direct(const Operand& operand) {
    return contiguous<Element>(operand) && is_aligned<Element>(operand);
  }

  // Whether four elements can be loaded at once, of whatever type.
  template <class T>
  __device__ __forceinline__ static bool quads(const Operand& operand) {
    if constexpr (sizeof(T) == sizeof(double)) return direct<double>(operand);
    return kContents == Contents::float32_contiguous ? is_aligned<float>(operand) : is_quad(operand);
  }

  template <class T>
  __device__ __forceinline__ static void load_quad(const Operand& operand, int64_t index, T (&to)[kQuad]) {
    if constexpr (kContents == Contents::float32_contiguous || sizeof(T) == sizeof(double)) {
      cuda::load_quad<T>(elements_of<const T>(operand) + index, to);
    } else {
      convert(load_raw(operand, index), operand.dtype, to);
    }
  }

  template <class T>
  __device__ __forceinline__ static T load(const TensorOperands& tensor, const Operand& operand,
                                           int64_t index) {
    if constexpr (kContents == Contents::float32_contiguous) {
      return elements_of<const float>(operand)[index];
    } else {
      const int64_t offset = element_offset(tensor, operand.strides, index);
      T value = 0;
      with_element(operand.dtype, [&](auto element) {
        value = static_cast<T>(to_compute(elements_of<const decltype(element)>(operand)[offset]));
      });
      return value;
    }
  }

  template <class T>
  __device__ __forceinline__ static void store(const TensorOperands& tensor, const Operand& operand,
                                               int64_t index, T value) {
    if constexpr (kContents == Contents::float32_contiguous) {
      elements_of<float>(operand)[index] = value;
    } else {
      const int64_t offset = element_offset(tensor, operand.strides, index);
      with_element(operand.dtype, [&](auto element) {
        using Element = decltype(element);
        elements_of<Element>(operand)[offset] = to_stored<Element>(value);
      });
    }
  }
};

// Calls function(Elements<contents>{}), on the host, to choose a kernel.
template <class Function>
void with_contents(Contents contents, Function function) {
  switch (contents) {
    case Contents::float32_contiguous:
      return function(Elements<Contents::float32_contiguous>{});
    case Contents::no_float64:
      return function(Elements<Contents::no_float64>{});
    case Contents::any:
      return function(Elements<Contents::any>{});
  }
}

}  // namespace steadygrad::cuda
