// The forward pass in two reads. In the first one every block sums up its part of a group of channels; once
// the sums are put together, the second one normalises from the last element to the first, so that those read
// last are still in L2.
#include "core/backend.h"
#include "cuda/batch_norm/one_read.h"
#include "cuda/batch_norm/passes.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {
namespace {

constexpr const char* kFunction = "batch_norm";

struct StatisticsArguments {
  Tiles tiles;
  const void* input;
  Moments* partials;
};

template <class Access, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<Access>)
    statistics_kernel(const StatisticsArguments __grid_constant__ arguments) {
  using T = typename Access::Compute;
  constexpr int kKept = kKeptBy<kColumns>;
  __shared__ SharedSums<T, kKept> shared;
  const Tiles& tiles = arguments.tiles;
  const int64_t split = blockIdx.x / tiles.groups;
  Cursor<kColumns, Access::kAligned> cursor(tiles, blockIdx.x % tiles.groups, split, threadIdx.x);
  ThreadMoments<T, kKept> moments = read_moments<Access, kColumns>(tiles, arguments.input, cursor,
                                                                   [](int, const typename Access::Unit&) {});
  reduce_moments<kColumns>(moments, cursor.x(), cursor.y(), tiles.width, tiles.depth, shared);
  if (cursor.y() != 0) return;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t channel = cursor.channel() + k;
    if (channel >= tiles.shape.channels) continue;
    arguments.partials[split * tiles.shape.channels + channel] = channel_moments(moments, k);
  }
}

struct NormalizeArguments {
  Tiles tiles;
  BatchNorm norm;
  BatchNormOutput out;
  int64_t* num_batches_tracked;  // goes up by one here, after earlier kernels have read it; may be null
};

template <class Access, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<Access>)
    normalize_kernel(const NormalizeArguments __grid_constant__ arguments) {
  using T = typename Access::Compute;
  constexpr int kKept = kKeptBy<kColumns>;
  constexpr int kAtOnce = kPairsAtOnce<Access>;
  __shared__ Normalization<T> shared[kMostGroupChannels];
  const Tiles& tiles = arguments.tiles;
  const BatchNorm& norm = arguments.norm;
  const BatchNormOutput& out = arguments.out;
  const int64_t numel = tiles.numel();
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t group = block % tiles.groups;
  if (block == 0 && threadIdx.x == 0 && arguments.num_batches_tracked != nullptr) {
    *arguments.num_batches_tracked += 1;
  }
  share_channels(tiles, group, shared,
                 [&](int64_t channel) { return channel_normalization<T>(norm, channel); });
  Cursor<kColumns, Access::kAligned> cursor(tiles, group, block / tiles.groups, threadIdx.x);
  Normalization<T> own[kKept];
  take_channels<kKept>(shared, cursor.x(), cursor.channel(), tiles.shape.channels, own);
  cursor.seek(cursor.count() - 1);
  for (int left = cursor.count(); left > 0; left -= kAtOnce) {
    Place places[kAtOnce];
    typename Access::Unit units[kAtOnce];
    typename Access::Unit residuals[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      places[j] = cursor.place(j < left);
      cursor.retreat();
      units[j] = Access::load(norm.input, tiles.dtype, places[j], numel);
    }
    if (out.residual != nullptr) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        residuals[j] = Access::load(out.residual, tiles.dtype, places[j], numel);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      normalize_unit<Access, kKept>(norm, out, places[j], units[j], residuals[j], own);
    }
  }
}

// Finds the statistics of `norm.input` with two kernels.
void launch_statistics(const BatchNorm& norm, double* statistics, const RunningStatistics& running,
                       const Allocate& allocate, Stream stream) {
  const Tiles tiles = tiles_for(kFunction, norm.shape, norm.dtype, are_aligned(norm.input), false, stream);
  const int64_t bytes = tiles.splits * norm.shape.channels * static_cast<int64_t>(sizeof(Moments));
  Moments* const partials = static_cast<Moments*>(allocate(bytes));
  with_access(tiles, [&](auto access, auto columns) {
    launch(kFunction, stream, statistics_kernel<decltype(access), decltype(columns)::value>, tiles.blocks(),
           kTileThreads, StatisticsArguments{tiles, norm.input, partials});
  });
  launch_finish_statistics(kFunction, partials, tiles.splits, norm.shape.channels, statistics, running,
                           stream);
}

void launch_normalize(const BatchNorm& norm, const BatchNormOutput& out, int64_t* num_batches_tracked,
                      Stream stream) {
  const Tiles tiles =
      tiles_for(kFunction, norm.shape, norm.dtype, are_aligned(norm.input, out.residual, out.output),
                out.mask != nullptr, stream);
  with_access(tiles, [&](auto access, auto columns) {
    launch(kFunction, stream, normalize_kernel<decltype(access), decltype(columns)::value>, tiles.blocks(),
           kTileThreads, NormalizeArguments{tiles, norm, out, num_batches_tracked});
  });
}

}  // namespace

void batch_norm_statistics(const BatchNorm& norm, double* statistics, const Allocate& allocate,
                           Stream stream) {
  const DeviceGuard guard(stream.device, kFunction);
  launch_statistics(norm, statistics, RunningStatistics(), allocate, stream);
}

void batch_norm_forward(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                        const RunningStatistics& running, const Allocate& allocate, Stream stream) {
  const DeviceGuard guard(stream.device, kFunction);
  if (forward_in_one_read(norm, out, statistics, running, allocate, stream)) return;
  launch_statistics(norm, statistics, running, allocate, stream);
  BatchNorm full = norm;
  full.mean = {statistics, DType::float64};
  full.var = {statistics + norm.shape.channels, DType::float64};
  launch_normalize(full, out, running.num_batches_tracked, stream);
}

void batch_norm_normalize(const BatchNorm& norm, const BatchNormOutput& out, const Allocate&, Stream stream) {
  const DeviceGuard guard(stream.device, kFunction);
  launch_normalize(norm, out, nullptr, stream);
}

}  // namespace steadygrad::cuda
