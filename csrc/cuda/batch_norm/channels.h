// A block works out in fp64 what its threads have to know of their channels, once, and keeps it in shared
// memory.
#pragma once

#include <cstdint>

#include "core/batch_norm.h"
#include "cuda/batch_norm/tiles.h"

namespace steadygrad::cuda {

constexpr int kMostGroupChannels = kTileThreads;

template <class T>
__device__ __forceinline__ Normalization<T> channel_normalization(const BatchNorm& norm, int64_t channel) {
  return normalization<T>(channel_value(norm.mean, channel, 0), channel_value(norm.var, channel, 1), norm.eps,
                          channel_value(norm.weight, channel, 1), channel_value(norm.bias, channel, 0));
}

// Fills shared[i] with find(channel) for the channels of a group. All threads of the block have to call this,
// since it ends with a barrier.
template <class Value, class Find>
__device__ __forceinline__ void share_channels(const Tiles& tiles, int64_t group, Value* shared, Find find) {
  const int64_t first = group * tiles.group_channels();
  for (int i = threadIdx.x; i < tiles.group_channels(); i += kTileThreads) {
    if (first + i < tiles.shape.channels) shared[i] = find(first + i);
  }
  __syncthreads();
}

// Copies the entries of a thread's own channels; x is the thread's unit of columns, or its channel.
template <int kKept, class Value>
__device__ __forceinline__ void take_channels(const Value* shared, int x, int64_t first, int64_t channels,
                                              Value (&own)[kKept]) {
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (first + k < channels) {
      own[k] = shared[kKept == 1 ? x : x * kUnit + k];
    } else {
      own[k] = Value{};
    }
  }
}

// Scale and offset of each channel, and the ceiling, with which ReLU's mask is found again where none was
// kept. They stay in shared memory, because few calls need them and backward kernels lack registers. kUnits
// is the width of a group in units.
template <class T, int kKept, int kUnits>
struct ReluTerms {
  T scale[kKept][kUnits];
  T offset[kKept][kUnits];
  T highest;

  __device__ __forceinline__ void set(int x, const Normalization<T> (&own)[kKept]) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      scale[k][x] = own[k].scale;
      offset[k][x] = own[k].offset;
    }
  }
  // The read is volatile because the compiler would else keep all of them in registers.
  __device__ __forceinline__ Normalization<T> get(int k, int x, T center) const {
    return {center, *const_cast<const volatile T*>(&scale[k][x]),
            *const_cast<const volatile T*>(&offset[k][x])};
  }
  __device__ __forceinline__ ReluBounds<T> bounds() const {
    return {T(0), *const_cast<const volatile T*>(&highest)};
  }
};

// Leaves the terms in shared memory and the centers of the thread's own channels in `centers`. `channels` is
// shared memory too.
template <class T, int kKept, int kUnits>
__device__ __forceinline__ void share_relu_terms(const Tiles& tiles, const BatchNorm& norm, int64_t group,
                                                 int x, int y, int64_t first, Normalization<T>* channels,
                                                 ReluTerms<T, kKept, kUnits>& terms, T (&centers)[kKept]) {
  share_channels(tiles, group, channels,
                 [&](int64_t channel) { return channel_normalization<T>(norm, channel); });
  Normalization<T> own[kKept];
  take_channels<kKept>(channels, x, first, tiles.shape.channels, own);
  if (y == 0) terms.set(x, own);
  if (threadIdx.x == 0) terms.highest = relu_bounds<T>(norm.ceiling).highest;
#pragma unroll
  for (int k = 0; k < kKept; ++k) centers[k] = own[k].center;
  __syncthreads();
}

}  // namespace steadygrad::cuda
