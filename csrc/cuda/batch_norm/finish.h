// How the partial results of blocks become what later kernels and the caller get.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "core/backend.h"
#include "core/batch_norm.h"

namespace steadygrad::cuda {

// What backward needs of a channel: sum(grad) and sum(grad * (x - mean)).
struct GradientSums {
  double grads;
  double products;
};

// Puts together what blocks found of one channel. Moments become sums around the first block's mean, which
// are added without a division and without a branch; `at(0)` loads that block's partial.
class MomentsTotal {
 public:
  using Partial = Moments;
  using Sums = ShiftedSums;

  template <class At>
  __device__ __forceinline__ explicit MomentsTotal(At at) : shift_(at(0).mean) {}
  __device__ __forceinline__ void add(Sums& sums, const Partial& part) const {
    steadygrad::add(sums, part, shift_);
  }
  __device__ __forceinline__ static void add(Sums& a, const Sums& b) {
    a.sum += b.sum;
    a.squares += b.squares;
    a.count += b.count;
  }
  __device__ __forceinline__ Moments of(const Sums& sums) const {
    return moments_from_sums(shift_, sums.sum, sums.squares, sums.count);
  }

 private:
  double shift_;
};

// Gradients' partials are sums already.
class GradientTotal {
 public:
  using Partial = GradientSums;
  using Sums = GradientSums;

  template <class At>
  __device__ __forceinline__ explicit GradientTotal(At) {}
  __device__ __forceinline__ static void add(Sums& a, const Sums& b) {
    a.grads += b.grads;
    a.products += b.products;
  }
  __device__ __forceinline__ static GradientSums of(const Sums& sums) { return sums; }
};

// The kernels that put together what the blocks of two reads found.
constexpr int kFinishThreads = 256;
constexpr int kFinishWidth = 8;  // channels of a block: their partials are neighbours in memory
constexpr int kFinishDepth = kFinishThreads / kFinishWidth;

// Partials that a thread loads before it adds them, so that it waits for memory once for all of them.
constexpr int kPartialsAtOnce = 8;

// Adds up partials `first`, `first` + `step` ... of `count`; at(i) loads the i-th.
template <class Total, class At>
__device__ __forceinline__ typename Total::Sums sum_partials(const Total& total, int first, int count,
                                                             int step, At at) {
  typename Total::Sums sums{};
  for (int begin = first; begin < count; begin += kPartialsAtOnce * step) {
    typename Total::Partial parts[kPartialsAtOnce];
    // Loads without a condition, so that none waits for another one.
#pragma unroll
    for (int k = 0; k < kPartialsAtOnce; ++k) parts[k] = at(min(begin + k * step, count - 1));
#pragma unroll
    for (int k = 0; k < kPartialsAtOnce; ++k) {
      if (begin + k * step < count) total.add(sums, parts[k]);
    }
  }
  return sums;
}

__device__ __forceinline__ void write_statistics(const ChannelStatistics& found, int64_t channel,
                                                 int64_t channels, double* statistics,
                                                 const RunningStatistics& running, int64_t batches) {
  statistics[channel] = found.mean;
  statistics[channels + channel] = found.var;
  if (channel == 0) statistics[2 * channels] = found.count;
  if (found.count > 0) {
    update_running(running, channel, running_factor(running, batches), found.mean, found.var, found.count);
  }
}

__device__ __forceinline__ int64_t batches_with_this_one(const RunningStatistics& running) {
  return running.num_batches_tracked != nullptr ? *running.num_batches_tracked + 1 : 0;
}

// Writes the gradients of weight and bias.
__device__ __forceinline__ void write_gradients(const GradientSums& total, int64_t channel,
                                                const BatchNorm& norm, const BatchNormGradient& grad) {
  set_channel_value(grad.grad_bias, channel, total.grads);
  if (grad.grad_weight.data == nullptr) return;
  const double inverse = inverse_deviation(channel_value(norm.var, channel, 1), norm.eps);
  set_channel_value(grad.grad_weight, channel, total.products * inverse);
}

// Leaves the statistics of all channels. `partials` holds those of all channels for the first split, then for
// the second one, and so on. num_batches_tracked is read and not written.
void launch_finish_statistics(const char* function, const Moments* partials, int32_t splits, int64_t channels,
                              double* statistics, const RunningStatistics& running, Stream stream);

// Leaves the sums in `sums`, unless it is null, and writes the gradients of weight and bias.
void launch_finish_gradients(const char* function, const GradientSums* partials, int32_t splits,
                             const BatchNorm& norm, const BatchNormGradient& grad, double* sums,
                             Stream stream);

}  // namespace steadygrad::cuda
