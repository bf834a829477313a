// Blocks' sums put together, channel by channel, in a fixed order.
#include <algorithm>

#include "core/backend.h"
#include "cuda/batch_norm/finish.h"
#include "cuda/lanes.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {
namespace {

constexpr int kFinishThreads = 256;
constexpr int kFinishWidth = 8;  // channels of a block: their partials are neighbours in memory
constexpr int kFinishDepth = kFinishThreads / kFinishWidth;

// Thread (x, y) takes splits y, y + depth ...; then threads are put together pairwise. y = 0 gets the result.
template <class Partial, class Combine>
__device__ __forceinline__ Partial finish_channel(const Partial* partials, int64_t splits, int64_t channels,
                                                  int64_t channel, Partial* shared, Combine combine) {
  const int x = threadIdx.x % kFinishWidth;
  const int y = threadIdx.x / kFinishWidth;
  Partial sum{};
  if (channel < channels) {
#pragma unroll 2
    for (int64_t split = y; split < splits; split += kFinishDepth) {
      combine(sum, partials[split * channels + channel]);
    }
  }
  for (int half = kFinishDepth / 2; half >= 1; half /= 2) {
    if (y >= half && y < 2 * half) shared[(y - half) * kFinishWidth + x] = sum;
    __syncthreads();
    if (y < half) combine(sum, shared[y * kFinishWidth + x]);
    __syncthreads();
  }
  return sum;
}

struct StatisticsArguments {
  const Moments* partials;
  int64_t splits;
  int64_t channels;
  double* statistics;
  RunningStatistics running;
};

__global__ void __launch_bounds__(kFinishThreads)
    finish_statistics_kernel(const StatisticsArguments __grid_constant__ arguments) {
  __shared__ SharedArray<Moments, kFinishThreads / 2> shared;
  const int64_t channel = int64_t{blockIdx.x} * kFinishWidth + threadIdx.x % kFinishWidth;
  const Moments moments = finish_channel(arguments.partials, arguments.splits, arguments.channels, channel,
                                         shared.data(), [](Moments& a, const Moments& b) { merge(a, b); });
  if (threadIdx.x >= kFinishWidth || channel >= arguments.channels) return;
  write_statistics(moments, channel, arguments.channels, arguments.statistics, arguments.running,
                   batches_with_this_one(arguments.running));
}

struct CombineArguments {
  const double* parts;
  int64_t count;
  int64_t channels;
  double* statistics;
  RunningStatistics running;
};

// More than one block only where none has to read num_batches_tracked.
__global__ void __launch_bounds__(kFinishThreads)
    combine_kernel(const CombineArguments __grid_constant__ arguments) {
  const int64_t channels = arguments.channels;
  const int64_t size = statistics_size(channels);
  const int64_t batches = arguments.running.cumulative ? batches_with_this_one(arguments.running) : 0;
  for (int64_t channel = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x; channel < channels;
       channel += int64_t{gridDim.x} * kFinishThreads) {
    Moments moments;
#pragma unroll 2
    for (int64_t i = 0; i < arguments.count; ++i) {
      const double* const part = arguments.parts + i * size;
      const double count = part[2 * channels];
      merge(moments, Moments{part[channel], part[channels + channel] * count, count});
    }
    write_statistics(moments, channel, channels, arguments.statistics, arguments.running, batches);
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0 && arguments.running.num_batches_tracked != nullptr) {
    *arguments.running.num_batches_tracked += 1;
  }
}

struct GradientArguments {
  const GradientSums* partials;
  int64_t splits;
  BatchNorm norm;
  BatchNormGradient grad;
  double* sums;
};

__global__ void __launch_bounds__(kFinishThreads)
    finish_gradients_kernel(const GradientArguments __grid_constant__ arguments) {
  __shared__ GradientSums shared[kFinishThreads / 2];
  const BatchNorm& norm = arguments.norm;
  const int64_t channels = norm.shape.channels;
  const int64_t channel = int64_t{blockIdx.x} * kFinishWidth + threadIdx.x % kFinishWidth;
  const GradientSums total = finish_channel(arguments.partials, arguments.splits, channels, channel, shared,
                                            [](GradientSums& a, const GradientSums& b) {
                                              a.grads += b.grads;
                                              a.products += b.products;
                                            });
  if (threadIdx.x >= kFinishWidth || channel >= channels) return;
  if (arguments.sums != nullptr) {
    arguments.sums[channel] = total.grads;
    arguments.sums[channels + channel] = total.products;
  }
  write_gradients(total, channel, norm, arguments.grad);
}

}  // namespace

void launch_finish_statistics(const char* function, const Moments* partials, int64_t splits, int64_t channels,
                              double* statistics, const RunningStatistics& running, Stream stream) {
  launch(function, stream, finish_statistics_kernel, blocks_for(channels, kFinishWidth), kFinishThreads,
         StatisticsArguments{partials, splits, channels, statistics, running});
}

void launch_finish_gradients(const char* function, const GradientSums* partials, int64_t splits,
                             const BatchNorm& norm, const BatchNormGradient& grad, double* sums,
                             Stream stream) {
  launch(function, stream, finish_gradients_kernel, blocks_for(norm.shape.channels, kFinishWidth),
         kFinishThreads, GradientArguments{partials, splits, norm, grad, sums});
}

void batch_norm_combine(const double* parts, int64_t count, int64_t channels, double* statistics,
                        const RunningStatistics& running, const Allocate&, Stream stream) {
  constexpr const char* kFunction = "batch_norm";
  const DeviceGuard guard(stream.device, kFunction);
  const bool reads_batches = running.cumulative && running.num_batches_tracked != nullptr;
  launch(kFunction, stream, combine_kernel, reads_batches ? 1 : blocks_for(channels, kFinishThreads),
         kFinishThreads, CombineArguments{parts, count, channels, statistics, running});
}

}  // namespace steadygrad::cuda
