// What a thread keeps of the channels it reads, and how the threads of a block put it together. Sums have a
// fixed order everywhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/batch_norm/tiles.h"

namespace steadygrad::cuda {

// So many elements of a channel are summed up before the sums are folded into mean and variance. They are
// summed around the mean of the first of them, so that little cancels even where one of them lies far from
// the others.
constexpr int kMostAtOnce = 64;

// Merges a variance with that of other elements, whose mean differs by `delta` and which are `ratio` of both
// together. Variances are merged and not sums of squares, which overflow much earlier.
template <class T>
__device__ __forceinline__ void merge_variance(T& variance, T added, T delta, T ratio) {
  variance += (added - variance) * ratio + delta * delta * (ratio * (1 - ratio));
}

// Mean and variance of what a thread has read. The mean is `base + mean`: `base` follows the data, and `mean`
// keeps what rounding took from it. kKept is 8 where each lane has a channel of its own, else 1.
template <class T, int kKept>
struct ThreadMoments {
  T base[kKept];
  T mean[kKept];
  T variance[kKept];
  T sum[kKept];
  T squares[kKept];
  int64_t count = 0;
  int pending = 0;

  __device__ __forceinline__ ThreadMoments() {
#pragma unroll
    for (int k = 0; k < kKept; ++k) base[k] = mean[k] = variance[k] = sum[k] = squares[k] = 0;
  }

  // The shift is the mean of some elements, which have to be given before any are added. Until
  // finish_shift() `base` holds their sums and `pending` how many they are.
  __device__ __forceinline__ void add_to_shift(const T (&values)[kUnit], unsigned lanes) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) base[kKept == 1 ? 0 : k] += has_lane(lanes, k) ? values[k] : T(0);
    pending += kKept == 1 ? __popc(lanes) : lanes != 0 ? 1 : 0;
  }
  __device__ __forceinline__ void finish_shift() {
    const T part = 1 / static_cast<T>(pending > 0 ? pending : 1);
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      base[k] *= part;
      if (!(base[k] - base[k] == 0)) base[k] = 0;  // not finite
    }
    pending = 0;
  }

  __device__ __forceinline__ void add(const T (&values)[kUnit], unsigned lanes) {
    if (lanes == 0) return;
    if constexpr (kKept == 1) {
      T deltas[kUnit];
#pragma unroll
      for (int k = 0; k < kUnit; ++k) deltas[k] = values[k] - base[0];
      if (lanes != kAllLanes) {
#pragma unroll
        for (int k = 0; k < kUnit; ++k) deltas[k] = has_lane(lanes, k) ? deltas[k] : T(0);
      }
      sum[0] += ((deltas[0] + deltas[4]) + (deltas[2] + deltas[6])) +
                ((deltas[1] + deltas[5]) + (deltas[3] + deltas[7]));
      T even = deltas[0] * deltas[0];
      T odd = deltas[1] * deltas[1];
#pragma unroll
      for (int k = 2; k < kUnit; k += 2) {
        even = fma(deltas[k], deltas[k], even);
        odd = fma(deltas[k + 1], deltas[k + 1], odd);
      }
      squares[0] += even + odd;
      pending += __popc(lanes);
    } else {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        const T delta = values[k] - base[k];
        sum[k] += delta;
        squares[k] = fma(delta, delta, squares[k]);
      }
      ++pending;
    }
  }

  // Folds if the sums would hold too many elements with `more` of them.
  __device__ __forceinline__ void fold_before(int more) {
    if (pending + more > kMostAtOnce) fold();
  }

  __device__ __forceinline__ void fold() {
    if (pending == 0) return;
    const T added = static_cast<T>(pending);
    const T before = static_cast<T>(count);
    const T part = 1 / added;
    const T ratio = added / (before + added);
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const T new_mean = sum[k] * part;
      const T left = (squares[k] - sum[k] * new_mean) * part;
      const T delta = new_mean - mean[k];
      merge_variance(variance[k], left < 0 ? T(0) : left, delta, ratio);
      mean[k] += delta * ratio;
      const T moved = base[k] + mean[k];
      mean[k] -= moved - base[k];
      base[k] = moved;
      sum[k] = squares[k] = 0;
    }
    count += pending;
    pending = 0;
  }
};

// What a thread has of sum(grad) and sum(grad * (x - center)).
template <class T, int kKept>
struct ThreadGradientSums {
  T grads[kKept] = {};
  T products[kKept] = {};
  T grads_pending[kKept] = {};
  T products_pending[kKept] = {};
  int pending = 0;

  // Lanes that do not count must hold zeros.
  __device__ __forceinline__ void add(const T (&grad)[kUnit], const T (&delta)[kUnit]) {
    if constexpr (kKept == 1) {
      grads_pending[0] +=
          ((grad[0] + grad[4]) + (grad[2] + grad[6])) + ((grad[1] + grad[5]) + (grad[3] + grad[7]));
      T even = grad[0] * delta[0];
      T odd = grad[1] * delta[1];
#pragma unroll
      for (int k = 2; k < kUnit; k += 2) {
        even = fma(grad[k], delta[k], even);
        odd = fma(grad[k + 1], delta[k + 1], odd);
      }
      products_pending[0] += even + odd;
      pending += kUnit;
    } else {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        grads_pending[k] += grad[k];
        products_pending[k] = fma(grad[k], delta[k], products_pending[k]);
      }
      ++pending;
    }
  }

  __device__ __forceinline__ void fold_before(int more) {
    if (pending + more > kMostAtOnce) fold();
  }

  __device__ __forceinline__ void fold() {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      grads[k] += grads_pending[k];
      products[k] += products_pending[k];
      grads_pending[k] = products_pending[k] = 0;
    }
    pending = 0;
  }
};

// Shared memory in which threads hand their sums to each other; each thread that takes some has an entry.
template <class T, int kKept>
struct SharedSums {
  static constexpr int kTakers = kKept == 1 ? kTileThreads : kTileThreads / 2;
  T first[kKept][kTakers];
  T second[kKept][kTakers];
  T third[kKept][kTakers];
  int64_t count[kTakers];
};

// Has the threads of a channel (y = 0 ... depth - 1) give(to) and take(from) until y = 0 has everything.
template <bool kColumns, class Give, class Take>
__device__ __forceinline__ void reduce_over_depth(int x, int y, int width, int depth, Give give, Take take) {
  for (int rows = depth; rows > 1; rows = (rows + 1) / 2) {
    const int half = (rows + 1) / 2;
    if (y >= half && y < rows) give(kColumns ? (y - half) * width + x : x * half + y - half);
    __syncthreads();
    if (y + half < rows) take(kColumns ? y * width + x : x * half + y);
    __syncthreads();
  }
}

template <bool kColumns, class T, int kKept>
__device__ __forceinline__ void reduce_moments(ThreadMoments<T, kKept>& own, int x, int y, int width,
                                               int depth, SharedSums<T, kKept>& shared) {
  reduce_over_depth<kColumns>(
      x, y, width, depth,
      [&](int to) {
        shared.count[to] = own.count;
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          shared.first[k][to] = own.base[k];
          shared.second[k][to] = own.mean[k];
          shared.third[k][to] = own.variance[k];
        }
      },
      [&](int from) {
        const int64_t added = shared.count[from];
        if (added == 0) return;
        const T before = static_cast<T>(own.count);
        const T ratio = static_cast<T>(added) / (before + static_cast<T>(added));
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          const T base = shared.first[k][from];
          const T mean = shared.second[k][from];
          if (own.count == 0) own.base[k] = base;
          const T delta = (base - own.base[k]) + (mean - own.mean[k]);
          merge_variance(own.variance[k], shared.third[k][from], delta, ratio);
          own.mean[k] += delta * ratio;
        }
        own.count += added;
      });
}

template <bool kColumns, class T, int kKept>
__device__ __forceinline__ void reduce_gradient_sums(ThreadGradientSums<T, kKept>& own, int x, int y,
                                                     int width, int depth, SharedSums<T, kKept>& shared) {
  reduce_over_depth<kColumns>(
      x, y, width, depth,
      [&](int to) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          shared.first[k][to] = own.grads[k];
          shared.second[k][to] = own.products[k];
        }
      },
      [&](int from) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          own.grads[k] += shared.first[k][from];
          own.products[k] += shared.second[k][from];
        }
      });
}

}  // namespace steadygrad::cuda
