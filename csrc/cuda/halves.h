// Two elements of half precision that share a word: taking them apart, and putting them together.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/elements.h"

namespace steadygrad::cuda {

// Takes a word's two elements apart, the lower one first. The device's own conversions are one instruction
// each.
template <class Element>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    low = bit_cast<float>(word << 16);
    high = bit_cast<float>(word & 0xffff0000u);
  } else {
#if defined(__CUDA_ARCH__)
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high)
        : "r"(word));
#else
    low = to_float(Float16{static_cast<uint16_t>(word)});
    high = to_float(Float16{static_cast<uint16_t>(word >> 16)});
#endif
  }
}

template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return to_stored<Element>(low).bits | static_cast<uint32_t>(to_stored<Element>(high).bits) << 16;
#endif
}

}  // namespace steadygrad::cuda
