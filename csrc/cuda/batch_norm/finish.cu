// Kernels that put together what the blocks of two reads, or the ranks of a group, found of each channel, in
// a fixed order.
#include <algorithm>

#include "core/backend.h"
#include "cuda/batch_norm/finish.h"
#include "cuda/lanes.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {
namespace {

// How many blocks of a multiprocessor the registers have to suffice for. Without it the compiler saves
// registers and has loads wait for each other.
[[maybe_unused]] constexpr int kFinishBlocks = 1;

// The total of a channel. Thread (x, y) takes splits y, y + depth ..., then threads add up pairwise, and
// those with y = 0 get the result.
template <class Total>
__device__ __forceinline__ typename Total::Partial finish_channel(const typename Total::Partial* partials,
                                                                  int splits, int64_t channels,
                                                                  int64_t channel,
                                                                  typename Total::Sums* shared) {
  const int x = threadIdx.x % kFinishWidth;
  const int y = threadIdx.x / kFinishWidth;
  const int64_t own = channel < channels ? channel : channels - 1;
  const auto at = [&](int split) { return partials[split * channels + own]; };
  const Total total(at);
  typename Total::Sums sums = sum_partials(total, y, splits, kFinishDepth, at);
  for (int half = kFinishDepth / 2; half >= 1; half /= 2) {
    if (y >= half && y < 2 * half) shared[(y - half) * kFinishWidth + x] = sums;
    __syncthreads();
    if (y < half) Total::add(sums, shared[y * kFinishWidth + x]);
    __syncthreads();
  }
  return total.of(sums);
}

struct StatisticsArguments {
  const Moments* partials;
  int32_t splits;
  int64_t channels;
  double* statistics;
  RunningStatistics running;
};

__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks)
    finish_statistics_kernel(const StatisticsArguments __grid_constant__ arguments) {
  __shared__ SharedArray<ShiftedSums, kFinishThreads / 2> shared;
  const int64_t channel = int64_t{blockIdx.x} * kFinishWidth + threadIdx.x % kFinishWidth;
  const Moments moments = finish_channel<MomentsTotal>(arguments.partials, arguments.splits,
                                                       arguments.channels, channel, shared.data());
  if (threadIdx.x >= kFinishWidth || channel >= arguments.channels) return;
  write_statistics(channel_statistics(moments), channel, arguments.channels, arguments.statistics,
                   arguments.running, batches_with_this_one(arguments.running));
}

struct CombineArguments {
  const double* parts;
  int64_t count;
  int64_t channels;
  double* statistics;
  RunningStatistics running;
};

// Where a thread reads num_batches_tracked there is one block, so that it is read before it goes up.
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks)
    combine_kernel(const CombineArguments __grid_constant__ arguments) {
  const int64_t channels = arguments.channels;
  const int64_t batches = arguments.running.cumulative ? batches_with_this_one(arguments.running) : 0;
  for (int64_t channel = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x; channel < channels;
       channel += int64_t{gridDim.x} * kFinishThreads) {
    write_statistics(combined_statistics(arguments.parts, arguments.count, channels, channel), channel,
                     channels, arguments.statistics, arguments.running, batches);
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0 && arguments.running.num_batches_tracked != nullptr) {
    *arguments.running.num_batches_tracked += 1;
  }
}

struct GradientArguments {
  const GradientSums* partials;
  int32_t splits;
  BatchNorm norm;
  BatchNormGradient grad;
  double* sums;
};

__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks)
    finish_gradients_kernel(const GradientArguments __grid_constant__ arguments) {
  __shared__ GradientSums shared[kFinishThreads / 2];
  const BatchNorm& norm = arguments.norm;
  const int64_t channels = norm.shape.channels;
  const int64_t channel = int64_t{blockIdx.x} * kFinishWidth + threadIdx.x % kFinishWidth;
  const GradientSums total =
      finish_channel<GradientTotal>(arguments.partials, arguments.splits, channels, channel, shared);
  if (threadIdx.x >= kFinishWidth || channel >= channels) return;
  if (arguments.sums != nullptr) {
    arguments.sums[channel] = total.grads;
    arguments.sums[channels + channel] = total.products;
  }
  write_gradients(total, channel, norm, arguments.grad);
}

}  // namespace

void launch_finish_statistics(const char* function, const Moments* partials, int32_t splits, int64_t channels,
                              double* statistics, const RunningStatistics& running, Stream stream) {
  launch(function, stream, finish_statistics_kernel, blocks_for(channels, kFinishWidth), kFinishThreads,
         StatisticsArguments{partials, splits, channels, statistics, running});
}

void launch_finish_gradients(const char* function, const GradientSums* partials, int32_t splits,
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
