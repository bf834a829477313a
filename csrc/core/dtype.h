// The element types that the kernels take, and their conversions to and from fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace steadygrad {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::float32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::float64;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::bfloat16;
};
template <>
struct DTypeOf<Float16> {
  static constexpr DType value = DType::float16;
};

template <class To, class From>
STEADYGRAD_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

STEADYGRAD_INLINE float to_float(BFloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

// The conversions select instead of branching, so that loops over them vectorise. On a GPU each is one
// instruction, whose NaN may have another payload.
STEADYGRAD_INLINE float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(value.bits));
  return converted;
#else
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t shifted = magnitude << 13;
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t non_finite = shifted + (224u << 23);
  const float subnormal = bit_cast<float>(shifted + (113u << 23)) - bit_cast<float>(113u << 23);
  uint32_t bits = magnitude >= 0x7c00u ? non_finite : normal;
  bits = magnitude < 0x0400u ? bit_cast<uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | sign);
#endif
}

// The conversions to half precision round to nearest, ties to even, as torch does.
STEADYGRAD_INLINE BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 converted;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(converted.bits) : "f"(value));
  return converted;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16{static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
#endif
}

STEADYGRAD_INLINE Float16 to_float16(float value) {
#if defined(__CUDA_ARCH__)
  Float16 converted;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted.bits) : "f"(value));
  return converted;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 makes the adder round a subnormal result: the last mantissa bit is then worth 2^-24, the
  // smallest step of fp16.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > (255u << 23) ? 0x7e00u : half;
  return Float16{static_cast<uint16_t>(half | sign)};
#endif
}

}  // namespace steadygrad
