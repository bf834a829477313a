// How a half-precision parameter is stored, and what happens to the bits of an update that it cannot hold. An
// update is computed on an fp32 value, which the parameter represents together with what is kept beside it.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace steadygrad {

// What happens to these bits. nearest: they are lost. stochastic: they decide the probability of rounding up.
// kahan: they are kept in a compensation of the parameter's dtype. master: they are kept in an fp32 copy.
// Parameters in fp32 and fp64 are always `nearest`.
enum class Rounding : uint8_t { nearest, stochastic, kahan, master };

constexpr STEADYGRAD_INLINE bool is_half(DType dtype) {
  return dtype == DType::bfloat16 || dtype == DType::float16;
}
// Returns whether something is kept beside a half-precision parameter.
constexpr STEADYGRAD_INLINE bool keeps_extra(Rounding rounding) {
  return rounding == Rounding::kahan || rounding == Rounding::master;
}

// -- random bits ------------------------------------------------------------------------------

// The finalizer of SplitMix64 (Steele, Lea and Flood 2014).
STEADYGRAD_INLINE uint64_t mixed(uint64_t bits) {
  bits += 0x9e3779b97f4a7c15u;
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
  return bits ^ bits >> 31;
}

// lowbias32 (Wellons 2018), which needs only the 32-bit multiplications that vector units have.
STEADYGRAD_INLINE uint32_t mixed(uint32_t bits) {
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return bits ^ bits >> 16;
}

// The key of the random bits of one chunk in one step.
struct RandomKey {
  uint32_t first = 0;
  uint32_t second = 0;
};

// `step` is the number of steps taken before this one, `place` the parameter's place in the order of the
// param groups, and `begin` the chunk's first element.
STEADYGRAD_INLINE RandomKey random_key(uint64_t seed, uint64_t step, int32_t place, int64_t begin) {
  uint64_t key = mixed(mixed(seed) ^ step);
  key = mixed(key ^ static_cast<uint64_t>(place));
  key = mixed(key ^ static_cast<uint64_t>(begin));
  return {static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key)};
}

// Returns the random bits of the chunk's element `index`.
STEADYGRAD_INLINE uint32_t random_bits(RandomKey key, uint32_t index) {
  return mixed(mixed(index ^ key.first) ^ key.second);
}

// -- rounding ---------------------------------------------------------------------------------

// Both functions return a value, as fp32, that the element type can hold.
template <class Element>
struct RoundedTo;

template <>
struct RoundedTo<BFloat16> {
  static STEADYGRAD_INLINE float nearest(float value) { return to_float(to_bfloat16(value)); }

  static STEADYGRAD_INLINE float stochastic(float value, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + (random >> 16)) & 0xffff0000u;
    // From the largest finite number on there is no number above to choose.
    return (bits & 0x7fffffffu) >= 0x7f7f0000u ? nearest(value) : bit_cast<float>(rounded);
  }
};

template <>
struct RoundedTo<Float16> {
  static STEADYGRAD_INLINE float nearest(float value) { return to_float(to_float16(value)); }

  static STEADYGRAD_INLINE float stochastic(float value, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + (random >> 19)) & ~0x1fffu;
    // Subnormals are 2^-24 apart. In units of 2^-44, they and 20 random bits are integers below 2^31. Larger
    // numbers are kept out of the conversion to integers, which would overflow.
    const bool is_subnormal = magnitude < (113u << 23);
    const float small = bit_cast<float>(is_subnormal ? magnitude : 0u);
    const int32_t units = static_cast<int32_t>(small * 0x1p44f) + static_cast<int32_t>(random >> 12);
    const float subnormal = static_cast<float>(units >> 20) * 0x1p-24f;
    uint32_t rounded = is_subnormal ? bit_cast<uint32_t>(subnormal) : normal;
    rounded |= bits & 0x80000000u;
    return magnitude >= 0x477fe000u ? nearest(value) : bit_cast<float>(rounded);
  }
};

// -- parameters -------------------------------------------------------------------------------

// Returns the fp32 value that a parameter and what is kept beside it represent. They belong together if that
// value rounds to the parameter. If not, something else has written the parameter, which then counts alone.
template <Rounding kRounding, class Element>
STEADYGRAD_INLINE float joined(float param, float extra) {
  if constexpr (kRounding == Rounding::master) {
    return RoundedTo<Element>::nearest(extra) == param ? extra : param;
  } else if constexpr (kRounding == Rounding::kahan) {
    // A rounded compensation may lie half-way between two numbers, but not beyond, so the test uses a little
    // less.
    const float within = extra * (255.0f / 256.0f);
    return RoundedTo<Element>::nearest(param + within) == param ? param + extra : param;
  } else {
    return param;
  }
}

// Splits `value` into the parameter, which is returned, and what is kept beside it.
template <Rounding kRounding, class Element>
STEADYGRAD_INLINE float split(float value, float& extra, uint32_t random) {
  if constexpr (kRounding == Rounding::stochastic) {
    return RoundedTo<Element>::stochastic(value, random);
  } else {
    const float param = RoundedTo<Element>::nearest(value);
    if constexpr (kRounding == Rounding::master) extra = value;
    if constexpr (kRounding == Rounding::kahan) {
      const float lost = value - param;
      // An infinite parameter has no compensation, since the lost part would not be a number.
      extra = RoundedTo<Element>::nearest(lost - lost == 0 ? lost : 0.0f);
    }
    return param;
  }
}

// Describes how the half-precision parameter of one chunk is stored.
struct ParamStorage {
  Rounding rounding = Rounding::nearest;
  DType dtype = DType::float32;
  RandomKey random;
};

// Calls function(RoundingConstant<...>{}, Element{}) for a half-precision dtype.
template <Rounding kRounding>
struct RoundingConstant {
  static constexpr Rounding value = kRounding;
};

template <class Function>
STEADYGRAD_INLINE void with_storage(Rounding rounding, DType dtype, Function function) {
  const auto with_element = [&](auto constant) __attribute__((always_inline)) {
    if (dtype == DType::bfloat16) {
      function(constant, BFloat16{});
    } else {
      function(constant, Float16{});
    }
  };
  switch (rounding) {
    case Rounding::nearest:
      return with_element(RoundingConstant<Rounding::nearest>{});
    case Rounding::stochastic:
      return with_element(RoundingConstant<Rounding::stochastic>{});
    case Rounding::kahan:
      return with_element(RoundingConstant<Rounding::kahan>{});
    case Rounding::master:
      return with_element(RoundingConstant<Rounding::master>{});
  }
}

}  // namespace steadygrad
