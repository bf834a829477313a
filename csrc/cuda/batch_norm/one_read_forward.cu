#include "cuda/batch_norm/one_read.h"
#include "cuda/batch_norm/passes.h"
#include "cuda/batch_norm/team_kernels.h"

namespace steadygrad::cuda {
namespace {

constexpr const char* kFunction = "batch_norm";

struct ForwardArguments {
  Teams teams;
  BatchNorm norm;
  BatchNormOutput out;
  double* statistics;
  RunningStatistics running;
};

template <class T, int kKept>
struct ForwardShared {
  union {
    alignas(16) unsigned char sums[sizeof(SharedSums<T, kKept>)];
    alignas(16) unsigned char merged[sizeof(ShiftedSums) * kTileThreads / 2];
  };
  alignas(16) unsigned char totals[sizeof(Moments) * kMostTeamChannels];
  Normalization<T> channels[kMostTeamChannels];
  int64_t batches;
};

template <class Access, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<Access>)
    one_read_forward_kernel(const ForwardArguments __grid_constant__ arguments) {
  using T = typename Access::Compute;
  constexpr int kKept = kKeptBy<kColumns>;
  constexpr int kAtOnce = kPairsAtOnce<Access>;
  using Shared = ForwardShared<T, kKept>;
  static_assert(sizeof(Shared) <= kTeamStaticBytes<T>, "what is left for units has been counted with less");
  __shared__ Shared shared;
  auto* const totals = reinterpret_cast<Moments*>(shared.totals);
  const Teams& teams = arguments.teams;
  const Tiles& tiles = teams.tiles;
  const BatchNorm& norm = arguments.norm;
  const RunningStatistics& running = arguments.running;
  const int64_t numel = tiles.numel();
  const int64_t team = blockIdx.x / tiles.splits;
  const int64_t rank = blockIdx.x % tiles.splits;
  // Kept in shared memory, where it costs no register until the statistics are written; each round has a
  // barrier before that.
  if (threadIdx.x == 0) shared.batches = running.cumulative ? batches_with_this_one(running) : 0;
  KeptUnits<Access> kept(teams, 0);
  begin_team(teams, team, rank);
  int round = 0;
  for (int64_t group = team; group < tiles.groups; group += teams.count, ++round) {
    Cursor<kColumns, Access::kAligned> cursor(tiles, group, rank, threadIdx.x);
    {
      ThreadMoments<T, kKept> moments = read_moments<Access, kColumns>(
          tiles, norm.input, cursor, [&](int k, const typename Access::Unit& unit) { kept.put(k, unit); });
      reduce_moments<kColumns>(moments, cursor.x(), cursor.y(), tiles.width, tiles.depth,
                               *reinterpret_cast<SharedSums<T, kKept>*>(shared.sums));
      if (cursor.y() == 0) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) totals[cursor.x() * kKept + k] = channel_moments(moments, k);
      }
    }
    total_of_team<MomentsTotal>(teams, team, rank, round, totals,
                                reinterpret_cast<ShiftedSums*>(shared.merged));
    const int64_t channel = group * tiles.group_channels() + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < tiles.group_channels() && channel < tiles.shape.channels) {
      const ChannelStatistics found = channel_statistics(totals[threadIdx.x]);
      if (rank == 0) {
        write_statistics(found, channel, tiles.shape.channels, arguments.statistics, running, shared.batches);
      }
      shared.channels[threadIdx.x] =
          normalization<T>(found.mean, found.var, norm.eps, channel_value(norm.weight, channel, 1),
                           channel_value(norm.bias, channel, 0));
    }
    __syncthreads();
    Normalization<T> own[kKept];
    take_channels<kKept>(shared.channels, cursor.x(), cursor.channel(), tiles.shape.channels, own);
    cursor.seek(0);
    for (int begin = 0; begin < cursor.count(); begin += kAtOnce) {
      Place places[kAtOnce];
      typename Access::Unit residuals[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        places[j] = cursor.place(begin + j < cursor.count());
        cursor.advance();
        if (arguments.out.residual != nullptr) {
          residuals[j] = Access::load(arguments.out.residual, tiles.dtype, places[j], numel);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (places[j].lanes == 0) continue;
        normalize_unit<Access, kKept>(norm, arguments.out, places[j], kept.get(begin + j), residuals[j], own);
      }
    }
  }
  // Every block that reads the number has done so before the barrier of the first round.
  if (blockIdx.x == 0 && threadIdx.x == 0 && running.num_batches_tracked != nullptr) {
    *running.num_batches_tracked += 1;
  }
}

}  // namespace

bool forward_in_one_read(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                         const RunningStatistics& running, const Allocate& allocate, Stream stream) {
  const Tiles tiles =
      tiles_for(kFunction, norm.shape, norm.dtype, are_aligned(norm.input, out.residual, out.output),
                out.mask != nullptr, stream);
  Teams teams = plan_teams(kFunction, tiles, 1, stream);
  if (teams.count == 0) return false;
  teams.meets = teams.tiles.splits > 1 || (running.cumulative && running.num_batches_tracked != nullptr);
  allocate_arena(allocate,
                 [&](Arena& arena) { take_team_memory(teams, sizeof(Moments) / sizeof(double), arena); });
  bool launched = false;
  with_wide_access(tiles, [&](auto access, auto columns) {
    using Access = decltype(access);
    launched =
        launch_teams(kFunction, stream, one_read_forward_kernel<Access, decltype(columns)::value>, teams, 1,
                     sizeof(typename Access::Unit), ForwardArguments{teams, norm, out, statistics, running});
  });
  return launched;
}

}  // namespace steadygrad::cuda
