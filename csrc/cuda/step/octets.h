// Eight neighbouring elements of two or four bytes at a time, of any of these types, for pass 2 of tensors
// that are not all fp32. What an operand's type asks for is a branch that every thread of a block takes
// alike, once for eight elements when they are loaded or stored and once for four when they are converted.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "cuda/elements.h"
#include "cuda/halves.h"

namespace steadygrad::cuda {

constexpr int kOctet = 8;

// Eight elements as they lie in memory: halves take the first four words. The loads of several operands,
// whose types differ, are under way together when none is converted before all are issued.
struct RawOctet {
  uint32_t words[kOctet];
};

STEADYGRAD_INLINE bool has_octets(const Operand& operand) {
  return operand.strides == nullptr && operand.dtype != DType::float64;
}

__device__ __forceinline__ bool takes_vectors(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
}

// Where the operand's element `index` lies.
__device__ __forceinline__ char* address_of(const Operand& operand, int64_t index) {
  return elements_of<char>(operand) + (index << (is_half(operand.dtype) ? 1 : 2));
}

// The first 16 bytes are loaded alike for all types. Loads in two branches would be merged into narrow ones.
__device__ __forceinline__ void load_octet(const Operand& operand, int64_t index, RawOctet& raw) {
  const uint4* const from = reinterpret_cast<const uint4*>(address_of(operand, index));
  const auto set_words = [&](int first, const uint4& words) {
    raw.words[first] = words.x;
    raw.words[first + 1] = words.y;
    raw.words[first + 2] = words.z;
    raw.words[first + 3] = words.w;
  };
  set_words(0, from[0]);
  if (!is_half(operand.dtype)) set_words(4, from[1]);
}

__device__ __forceinline__ void store_octet(const Operand& operand, int64_t index, const RawOctet& raw) {
  uint4* const to = reinterpret_cast<uint4*>(address_of(operand, index));
  to[0] = make_uint4(raw.words[0], raw.words[1], raw.words[2], raw.words[3]);
  if (is_half(operand.dtype)) return;
  to[1] = make_uint4(raw.words[4], raw.words[5], raw.words[6], raw.words[7]);
}

// Operands that begin anywhere are accessed one element at a time. Neighbours in a warp share the sectors
// that they touch.
__device__ __forceinline__ void load_octet_apart(const Operand& operand, int64_t index, RawOctet& raw) {
  if (takes_vectors(operand.data)) return load_octet(operand, index, raw);
  if (is_half(operand.dtype)) {
    const uint16_t* const from = elements_of<const uint16_t>(operand) + index;
#pragma unroll
    for (int w = 0; w < kOctet / 2; ++w) raw.words[w] = from[2 * w] | uint32_t{from[2 * w + 1]} << 16;
  } else {
    const uint32_t* const from = elements_of<const uint32_t>(operand) + index;
#pragma unroll
    for (int w = 0; w < kOctet; ++w) raw.words[w] = from[w];
  }
}

__device__ __forceinline__ void store_octet_apart(const Operand& operand, int64_t index,
                                                  const RawOctet& raw) {
  if (takes_vectors(operand.data)) return store_octet(operand, index, raw);
  if (is_half(operand.dtype)) {
    uint16_t* const to = elements_of<uint16_t>(operand) + index;
#pragma unroll
    for (int k = 0; k < kOctet; ++k) to[k] = static_cast<uint16_t>(raw.words[k / 2] >> (k % 2 * 16));
  } else {
    uint32_t* const to = elements_of<uint32_t>(operand) + index;
#pragma unroll
    for (int w = 0; w < kOctet; ++w) to[w] = raw.words[w];
  }
}

// Brings elements 4 * half to 4 * half + 3 into fp32, and pack_quad() brings them back.
__device__ __forceinline__ void unpack_quad(const RawOctet& raw, DType dtype, int half, float (&to)[kQuad]) {
  if (dtype == DType::bfloat16) {
#pragma unroll
    for (int w = 0; w < kQuad / 2; ++w) unpack<BFloat16>(raw.words[2 * half + w], to[2 * w], to[2 * w + 1]);
  } else if (dtype == DType::float16) {
#pragma unroll
    for (int w = 0; w < kQuad / 2; ++w) unpack<Float16>(raw.words[2 * half + w], to[2 * w], to[2 * w + 1]);
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) to[k] = bit_cast<float>(raw.words[4 * half + k]);
  }
}

__device__ __forceinline__ void pack_quad(const float (&from)[kQuad], DType dtype, int half, RawOctet& raw) {
  if (dtype == DType::bfloat16) {
#pragma unroll
    for (int w = 0; w < kQuad / 2; ++w)
      raw.words[2 * half + w] = pack<BFloat16>(from[2 * w], from[2 * w + 1]);
  } else if (dtype == DType::float16) {
#pragma unroll
    for (int w = 0; w < kQuad / 2; ++w) raw.words[2 * half + w] = pack<Float16>(from[2 * w], from[2 * w + 1]);
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) raw.words[4 * half + k] = bit_cast<uint32_t>(from[k]);
  }
}

}  // namespace steadygrad::cuda
