// From the sums of all blocks to what later kernels and the caller get.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "core/backend.h"
#include "core/batch_norm.h"

namespace steadygrad::cuda {

// sum(grad) and sum(grad * (x - mean)).
struct GradientSums {
  double grads;
  double products;
};

__device__ __forceinline__ void write_statistics(const Moments& moments, int64_t channel, int64_t channels,
                                                 double* statistics, const RunningStatistics& running,
                                                 int64_t batches) {
  const double var = moments.count > 0 ? moments.squares / moments.count : 0;
  statistics[channel] = moments.mean;
  statistics[channels + channel] = var;
  if (channel == 0) statistics[2 * channels] = moments.count;
  if (moments.count > 0) {
    update_running(running, channel, running_factor(running, batches), moments.mean, var, moments.count);
  }
}

__device__ __forceinline__ int64_t batches_with_this_one(const RunningStatistics& running) {
  return running.num_batches_tracked != nullptr ? *running.num_batches_tracked + 1 : 0;
}

// Those of weight and bias.
__device__ __forceinline__ void write_gradients(const GradientSums& total, int64_t channel,
                                                const BatchNorm& norm, const BatchNormGradient& grad) {
  set_channel_value(grad.grad_bias, channel, total.grads);
  if (grad.grad_weight.data == nullptr) return;
  const double inverse = inverse_deviation(channel_value(norm.var, channel, 1), norm.eps);
  set_channel_value(grad.grad_weight, channel, total.products * inverse);
}

// `partials`: of each split, those of all channels. num_batches_tracked is read and not written.
void launch_finish_statistics(const char* function, const Moments* partials, int64_t splits, int64_t channels,
                              double* statistics, const RunningStatistics& running, Stream stream);

// `sums`: may be null.
void launch_finish_gradients(const char* function, const GradientSums* partials, int64_t splits,
                             const BatchNorm& norm, const BatchNormGradient& grad, double* sums,
                             Stream stream);

}  // namespace steadygrad::cuda
