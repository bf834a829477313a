// Units of eight neighbouring elements: how they are loaded, taken apart and stored.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/elements.h"
#include "cuda/halves.h"

namespace steadygrad::cuda {

constexpr int kUnit = 8;
constexpr unsigned kAllLanes = (1u << kUnit) - 1;

// Where a unit lies, and which of its elements count; where none do there is no unit.
struct Place {
  int64_t offset;
  int64_t mask_byte;
  unsigned lanes;
};

__device__ __forceinline__ unsigned lanes_between(int64_t first, int64_t last) {
  const unsigned from = first < 0 ? 0 : static_cast<unsigned>(first);
  const unsigned to = last > kUnit ? kUnit : static_cast<unsigned>(last < 0 ? 0 : last);
  return from >= to ? 0 : ((1u << to) - 1) & ~((1u << from) - 1);
}

__device__ __forceinline__ bool has_lane(unsigned lanes, int k) { return (lanes >> k & 1u) != 0; }

// Units that begin at a multiple of 16 bytes.
template <class Stored>
struct Wide {
  using Element = Stored;
  using Compute = std::conditional_t<sizeof(Stored) == 8, double, float>;
  static constexpr bool kAligned = true;
  static constexpr int kWords = sizeof(Stored) * kUnit / sizeof(uint4);
  static constexpr int kAtOnce = 8 / kWords;  // units in flight: 128 bytes a thread

  struct Unit {
    uint4 words[kWords];
  };

  // Reads whole units, also where not all lanes count; only the last unit of a tensor can lie across its end.
  __device__ __forceinline__ static Unit load(const void* data, DType, const Place& place, int64_t numel) {
    Unit unit;
#pragma unroll
    for (int w = 0; w < kWords; ++w) unit.words[w] = make_uint4(0, 0, 0, 0);
    if (place.lanes == 0) return unit;
    const Stored* const from = static_cast<const Stored*>(data) + place.offset;
    if (place.offset + kUnit <= numel) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) unit.words[w] = reinterpret_cast<const uint4*>(from)[w];
    } else {
      Compute values[kUnit];
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        values[k] = has_lane(place.lanes, k) ? to_compute(from[k]) : Compute(0);
      }
      unit = packed(values);
    }
    return unit;
  }

  __device__ __forceinline__ static void unpack(const Unit& unit, Compute (&values)[kUnit]) {
    if constexpr (sizeof(Stored) == 2) {
      cuda::unpack<Stored>(unit.words[0].x, values[0], values[1]);
      cuda::unpack<Stored>(unit.words[0].y, values[2], values[3]);
      cuda::unpack<Stored>(unit.words[0].z, values[4], values[5]);
      cuda::unpack<Stored>(unit.words[0].w, values[6], values[7]);
    } else if constexpr (sizeof(Stored) == 4) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        values[4 * w] = bit_cast<float>(unit.words[w].x);
        values[4 * w + 1] = bit_cast<float>(unit.words[w].y);
        values[4 * w + 2] = bit_cast<float>(unit.words[w].z);
        values[4 * w + 3] = bit_cast<float>(unit.words[w].w);
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        values[2 * w] = joined(unit.words[w].x, unit.words[w].y);
        values[2 * w + 1] = joined(unit.words[w].z, unit.words[w].w);
      }
    }
  }

  __device__ __forceinline__ static Unit packed(const Compute (&values)[kUnit]) {
    Unit unit;
    if constexpr (sizeof(Stored) == 2) {
      unit.words[0] = make_uint4(pack<Stored>(values[0], values[1]), pack<Stored>(values[2], values[3]),
                                 pack<Stored>(values[4], values[5]), pack<Stored>(values[6], values[7]));
    } else if constexpr (sizeof(Stored) == 4) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        unit.words[w] =
            make_uint4(bit_cast<uint32_t>(values[4 * w]), bit_cast<uint32_t>(values[4 * w + 1]),
                       bit_cast<uint32_t>(values[4 * w + 2]), bit_cast<uint32_t>(values[4 * w + 3]));
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint64_t low = bit_cast<uint64_t>(values[2 * w]);
        const uint64_t high = bit_cast<uint64_t>(values[2 * w + 1]);
        unit.words[w] = make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                                   static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
      }
    }
    return unit;
  }

  __device__ __forceinline__ static void store(void* data, DType, const Place& place,
                                               const Compute (&values)[kUnit]) {
    if (place.lanes == 0) return;
    Stored* const to = static_cast<Stored*>(data) + place.offset;
    if (place.lanes == kAllLanes) {
      const Unit unit = packed(values);
#pragma unroll
      for (int w = 0; w < kWords; ++w) reinterpret_cast<uint4*>(to)[w] = unit.words[w];
      return;
    }
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      if (has_lane(place.lanes, k)) to[k] = to_stored<Stored>(values[k]);
    }
  }

  __device__ __forceinline__ static Compute element(const void* data, DType, int64_t offset) {
    return to_compute(static_cast<const Stored*>(data)[offset]);
  }

 private:
  __device__ __forceinline__ static double joined(uint32_t low, uint32_t high) {
    return bit_cast<double>(static_cast<uint64_t>(high) << 32 | low);
  }
};

// Units that begin anywhere, element by element, in any type that is computed in T.
template <class T>
struct Narrow {
  using Compute = T;
  static constexpr bool kAligned = false;
  static constexpr int kAtOnce = sizeof(T) == 8 ? 1 : 2;

  struct Unit {
    T values[kUnit];
  };

  __device__ __forceinline__ static T element(const void* data, DType dtype, int64_t offset) {
    if constexpr (sizeof(T) == 8) {
      return static_cast<const double*>(data)[offset];
    } else {
      if (dtype == DType::float32) return static_cast<const float*>(data)[offset];
      const uint16_t bits = static_cast<const uint16_t*>(data)[offset];
      return dtype == DType::bfloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
    }
  }

  __device__ __forceinline__ static Unit load(const void* data, DType dtype, const Place& place, int64_t) {
    Unit unit;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      unit.values[k] = has_lane(place.lanes, k) ? element(data, dtype, place.offset + k) : T(0);
    }
    return unit;
  }

  __device__ __forceinline__ static void unpack(const Unit& unit, T (&values)[kUnit]) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) values[k] = unit.values[k];
  }

  __device__ __forceinline__ static void store(void* data, DType dtype, const Place& place,
                                               const T (&values)[kUnit]) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      if (!has_lane(place.lanes, k)) continue;
      if constexpr (sizeof(T) == 8) {
        static_cast<double*>(data)[place.offset + k] = values[k];
      } else if (dtype == DType::float32) {
        static_cast<float*>(data)[place.offset + k] = values[k];
      } else {
        static_cast<uint16_t*>(data)[place.offset + k] =
            dtype == DType::bfloat16 ? to_bfloat16(values[k]).bits : to_float16(values[k]).bits;
      }
    }
  }
};

}  // namespace steadygrad::cuda
