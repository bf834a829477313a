// The lanes of core/norm.h on a warp and on a block. A warp takes a row of kLanes elements at a time, and
// thread i of it lanes 4i to 4i + 3; a block of kLanes threads has one lane per thread. Both add in core's
// order.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "core/float_pair.h"
#include "core/norm.h"
#include "cuda/elements.h"

namespace steadygrad::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
static_assert(kWarp * kQuad == kLanes, "a warp takes one row of lanes");

// Per-chunk partials as arrays of their own: a reduction reads only what can differ from zero.
struct ChunkPartials {
  double* small = nullptr;  // null unless fp64 squares are summed
  double* medium = nullptr;
  double* large = nullptr;
  uint32_t* counts = nullptr;  // non-finite elements, and 2^16 times those that are NaN

  __device__ __forceinline__ void store(int32_t chunk, const NormPartial& partial) const {
    medium[chunk] = partial.sums.medium;
    if (small != nullptr) small[chunk] = partial.sums.small;
    if (large != nullptr) large[chunk] = partial.sums.large;
    counts[chunk] = static_cast<uint32_t>(partial.nonfinite) | static_cast<uint32_t>(partial.nan) << 16;
  }
  template <bool kScaledSquares>
  __device__ __forceinline__ NormPartial load(int32_t chunk) const {
    NormPartial partial;
    partial.sums.medium = medium[chunk];
    if constexpr (kScaledSquares) {
      partial.sums.small = small[chunk];
      partial.sums.large = large[chunk];
    }
    partial.nonfinite = counts[chunk] & 0xffffu;
    partial.nan = counts[chunk] >> 16;
    return partial;
  }
};
static_assert(kChunk < 1 << 16, "a chunk's counts fit 16 bits");

// The four lanes of one thread.
struct Lanes {
  double values[kQuad];

  __device__ __forceinline__ explicit Lanes(double value) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) values[k] = value;
  }

  // The warp's lanes, combined; the result is thread 0's.
  __device__ __forceinline__ double combined(NormType type) {
#pragma unroll
    for (int half = kWarp / 2; half >= 1; half /= 2) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        values[k] = combine(type, values[k], __shfl_down_sync(kFullWarp, values[k], half));
      }
    }
    return combine(type, combine(type, values[0], values[2]), combine(type, values[1], values[3]));
  }
};

// All the sums of a norm. Only fp64 squares have small and large ones.
template <class T>
struct LaneSums {
  Lanes medium;

  __device__ __forceinline__ explicit LaneSums(NormType type) : medium(norm_identity(type)) {}

  __device__ __forceinline__ void add_square(int k, T x) {
    // The square of an fp32 value is exact in fp64, so the sum has the bits that a product and a sum would
    // have.
    medium.values[k] = fma(static_cast<double>(x), static_cast<double>(x), medium.values[k]);
  }
  __device__ __forceinline__ void add(NormType type, int k, T x, double scale) {
    medium.values[k] = combine(type, medium.values[k], norm_term(type, static_cast<double>(x), scale));
  }
  __device__ __forceinline__ NormSums combined(NormType type) { return {0, medium.combined(type), 0}; }
};

template <>
struct LaneSums<double> {
  Lanes small{0.0};
  Lanes medium;
  Lanes large{0.0};

  __device__ __forceinline__ explicit LaneSums(NormType type) : medium(norm_identity(type)) {}

  __device__ __forceinline__ void add_square(int k, double x) {
    small.values[k] += SmallSquare()(x);
    medium.values[k] += MediumSquare()(x);
    large.values[k] += LargeSquare()(x);
  }
  __device__ __forceinline__ void add(NormType type, int k, double x, double scale) {
    if (type.kind == NormKind::two) return add_square(k, x);
    medium.values[k] = combine(type, medium.values[k], norm_term(type, x, scale));
  }
  __device__ __forceinline__ NormSums combined(NormType type) {
    constexpr NormType kAdded{NormKind::two, 2};
    return {small.combined(kAdded), medium.combined(type), large.combined(kAdded)};
  }
};

// The squares of fp32 elements without fp64, for GPUs where that is slow. The order of these sums is not
// core's: each thread puts its four lanes together in pairs of fp32 before the warp adds in fp64.
struct PairLanes {
  FloatPair pairs[kQuad];
  uint32_t bits = 0;  // those of all elements together

  __device__ __forceinline__ void add_square(int k, float x) {
    pairs[k].add_square(x);
    bits |= bit_cast<uint32_t>(x);
  }

  // Whether the sum, which all threads get, is as good as one in fp64.
  __device__ __forceinline__ bool combined(double& sum) {
    pairs[0].add(pairs[2]);
    pairs[1].add(pairs[3]);
    pairs[0].add(pairs[1]);
    sum = pairs[0].value();
#pragma unroll
    for (int half = kWarp / 2; half >= 1; half /= 2) sum += __shfl_xor_sync(kFullWarp, sum, half);
    return FloatPair::holds(sum) || __all_sync(kFullWarp, bits << 1 == 0) != 0;
  }
};

// Shared memory for a type with initialisers, which CUDA does not take for shared variables.
template <class T, int kCount>
struct SharedArray {
  alignas(T) unsigned char bytes[sizeof(T) * kCount];

  __device__ __forceinline__ T* data() { return reinterpret_cast<T*>(bytes); }
};

// combine_in_order() on a block of kLanes threads, all of which get the result. `lanes` is shared memory. A
// thread has kAtOnce of its loads under way before it adds the first, so that they hide each other's latency.
template <int kAtOnce = 1, class Partial, class Get, class Combine>
__device__ __forceinline__ Partial block_combine_in_order(int64_t count, Partial identity, Partial* lanes,
                                                          Get get, Combine combine) {
  const int lane = threadIdx.x;
  Partial sum = identity;
  for (int64_t i = lane; i < count; i += kAtOnce * kLanes) {
    Partial loaded[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (i + k * kLanes < count) loaded[k] = get(i + k * kLanes);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (i + k * kLanes >= count) continue;
      if (k == 0 && i == lane) {
        sum = loaded[k];
      } else {
        combine(sum, loaded[k]);
      }
    }
  }
  lanes[lane] = sum;
  for (int half = kLanes / 2; half >= 1; half /= 2) {
    __syncthreads();
    if (lane < half) combine(lanes[lane], lanes[lane + half]);
  }
  __syncthreads();
  sum = lanes[0];
  __syncthreads();
  return sum;
}

}  // namespace steadygrad::cuda
