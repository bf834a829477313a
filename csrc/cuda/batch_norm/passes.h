// What one thread does with its units: it sums them up, normalises them, and takes their gradients. The paths
// of two reads and of one read are both made of this.
#pragma once

#include <cstdint>

#include "core/batch_norm.h"
#include "cuda/batch_norm/channels.h"
#include "cuda/batch_norm/finish.h"
#include "cuda/batch_norm/sums.h"

namespace steadygrad::cuda {

// How many blocks of a multiprocessor the registers have to suffice for. A block that computes in fp64 takes
// the registers of two.
template <class Access>
constexpr int kBlocksAtOnce = sizeof(typename Access::Compute) == 8 ? 1 : 2;

// A thread keeps sums for each of its lanes where these belong to different channels, else one for all lanes.
template <bool kColumns>
constexpr int kKeptBy = kColumns ? kUnit : 1;

// How many units a thread loads before it uses them: of the input alone, and of input and gradient each. For
// more columns of half precision there are not enough registers.
template <class Access, bool kColumns>
constexpr int kInputsAtOnce = kColumns && Access::kAtOnce == 8 ? 6 : Access::kAtOnce;
template <class Access, bool kColumns>
constexpr int kGradientsAtOnce = kColumns && Access::kAtOnce == 8 ? 3 : kPairsAtOnce<Access>;

// Returns the moments of what the thread reads; keep(k, unit) is given its k-th unit.
template <class Access, bool kColumns, class Keep>
__device__ __forceinline__ ThreadMoments<typename Access::Compute, kKeptBy<kColumns>> read_moments(
    const Tiles& tiles, const void* input, Cursor<kColumns, Access::kAligned>& cursor, Keep keep) {
  using T = typename Access::Compute;
  constexpr int kKept = kKeptBy<kColumns>;
  constexpr int kUnitCount = kColumns ? 1 : kUnit;  // elements that a unit adds to a channel
  constexpr int kAtOnce = kInputsAtOnce<Access, kColumns>;
  const int64_t numel = tiles.numel();
  ThreadMoments<T, kKept> moments;
  cursor.seek(0);
  for (int begin = 0; begin < cursor.count(); begin += kAtOnce) {
    unsigned lanes[kAtOnce];
    typename Access::Unit units[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const Place place = cursor.place(begin + j < cursor.count());
      cursor.advance();
      lanes[j] = place.lanes;
      units[j] = Access::load(input, tiles.dtype, place, numel);
    }
    if (begin == 0) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        T values[kUnit];
        Access::unpack(units[j], values);
        moments.add_to_shift(values, lanes[j]);
      }
      moments.finish_shift();
    }
    moments.fold_before(kAtOnce * kUnitCount);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (lanes[j] != 0) keep(begin + j, units[j]);
      T values[kUnit];
      Access::unpack(units[j], values);
      moments.add(values, lanes[j]);
    }
  }
  moments.fold();
  return moments;
}

template <class T, int kKept>
__device__ __forceinline__ Moments channel_moments(const ThreadMoments<T, kKept>& moments, int k) {
  return {static_cast<double>(moments.base[k]) + static_cast<double>(moments.mean[k]),
          static_cast<double>(moments.variance[k]) * static_cast<double>(moments.count),
          static_cast<double>(moments.count)};
}

// Writes output and mask of one unit. `residual` is the residual's unit, and not read where there is none.
template <class Access, int kKept>
__device__ __forceinline__ void normalize_unit(const BatchNorm& norm, const BatchNormOutput& out,
                                               const Place& place, const typename Access::Unit& unit,
                                               const typename Access::Unit& residual,
                                               const Normalization<typename Access::Compute> (&own)[kKept]) {
  using T = typename Access::Compute;
  T values[kUnit];
  Access::unpack(unit, values);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) values[k] = own[kKept == 1 ? 0 : k](values[k]);
  if (out.residual != nullptr) {
    T added[kUnit];
    Access::unpack(residual, added);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) values[k] += added[k];
  }
  const ReluBounds<T> bounds = relu_bounds<T>(norm.ceiling);
  if (out.mask != nullptr && place.lanes != 0) {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) bits |= bounds.stop(values[k]) ? 0u : 1u << k;
    out.mask[place.mask_byte] = static_cast<uint8_t>(bits & place.lanes);
  }
  if (norm.has_relu()) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) values[k] = bounds(values[k]);
  }
  Access::store(out.output, norm.dtype, place, values);
}

// How it is known which lanes ReLU let through: all of them where no ReLU followed.
enum class Passage : uint8_t { all, mask, recomputed };

__device__ __forceinline__ Passage passage_of(const BatchNorm& norm, const BatchNormGradient& grad) {
  if (!norm.has_relu()) return Passage::all;
  return grad.mask != nullptr ? Passage::mask : Passage::recomputed;
}

// Loads a unit's bits of the mask; where there is no mask all are set.
__device__ __forceinline__ unsigned load_mask(Passage passage, const BatchNormGradient& grad,
                                              const Place& place) {
  return passage == Passage::mask && place.lanes != 0 ? grad.mask[place.mask_byte] : kAllLanes;
}

template <class T, int kKept, int kUnits>
__device__ __forceinline__ unsigned lanes_let_through(Passage passage, unsigned lanes, const T (&x)[kUnit],
                                                      const T (&centers)[kKept],
                                                      const ReluTerms<T, kKept, kUnits>& terms, int unit) {
  if (passage != Passage::recomputed) return lanes;
  const ReluBounds<T> bounds = terms.bounds();
  unsigned bits = 0;
#pragma unroll
  for (int k = 0; k < kUnit; ++k) {
    const int kept = kKept == 1 ? 0 : k;
    bits |= bounds.stop(terms.get(kept, unit, centers[kept])(x[k])) ? 0u : 1u << k;
  }
  return lanes & bits;
}

// Returns the sums over what the thread reads; keep(k, place, unit, passed) is given its k-th unit and the
// gradient that ReLU let through.
template <class Access, bool kColumns, int kUnits, class Keep>
__device__ __forceinline__ ThreadGradientSums<typename Access::Compute, kKeptBy<kColumns>> read_gradient_sums(
    const Tiles& tiles, const BatchNorm& norm, const BatchNormGradient& grad,
    Cursor<kColumns, Access::kAligned>& cursor, const typename Access::Compute (&centers)[kKeptBy<kColumns>],
    const ReluTerms<typename Access::Compute, kKeptBy<kColumns>, kUnits>& terms, Keep keep) {
  using T = typename Access::Compute;
  constexpr int kKept = kKeptBy<kColumns>;
  constexpr int kUnitCount = kColumns ? 1 : kUnit;
  constexpr int kAtOnce = kGradientsAtOnce<Access, kColumns>;
  const int64_t numel = tiles.numel();
  const Passage passage = passage_of(norm, grad);
  ThreadGradientSums<T, kKept> sums;
  cursor.seek(0);
  for (int begin = 0; begin < cursor.count(); begin += kAtOnce) {
    Place places[kAtOnce];
    unsigned bits[kAtOnce];
    typename Access::Unit inputs[kAtOnce];
    typename Access::Unit grads[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      places[j] = cursor.place(begin + j < cursor.count());
      cursor.advance();
      inputs[j] = Access::load(norm.input, tiles.dtype, places[j], numel);
      grads[j] = Access::load(grad.grad_output, tiles.dtype, places[j], numel);
      bits[j] = load_mask(passage, grad, places[j]);
    }
    sums.fold_before(kAtOnce * kUnitCount);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      T x[kUnit];
      T passed[kUnit];
      Access::unpack(inputs[j], x);
      Access::unpack(grads[j], passed);
      const unsigned lanes =
          lanes_let_through(passage, places[j].lanes & bits[j], x, centers, terms, cursor.x());
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        const bool counts = has_lane(lanes, k);
        x[k] = counts ? x[k] - centers[kKept == 1 ? 0 : k] : T(0);
        passed[k] = counts ? passed[k] : T(0);
      }
      if (places[j].lanes != 0) keep(begin + j, places[j], inputs[j], passed);
      sums.add(passed, x);
    }
  }
  sums.fold();
  return sums;
}

// The sums of one channel. The thread multiplied with x - center, and `center` is the mean rounded to T.
template <class T, int kKept>
__device__ __forceinline__ GradientSums channel_sums(const ThreadGradientSums<T, kKept>& sums, int k,
                                                     T center, double mean) {
  const double grads = static_cast<double>(sums.grads[k]);
  return {grads, static_cast<double>(sums.products[k]) - (mean - static_cast<double>(center)) * grads};
}

template <class T>
__device__ __forceinline__ InputGradient<T> channel_gradient(const BatchNorm& norm, int64_t channel,
                                                             double grad_mean, double product_mean) {
  return input_gradient<T>(channel_value(norm.mean, channel, 0), channel_value(norm.var, channel, 1),
                           norm.eps, channel_value(norm.weight, channel, 1), grad_mean, product_mean);
}

}  // namespace steadygrad::cuda
