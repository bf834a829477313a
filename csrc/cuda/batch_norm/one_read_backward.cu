#include "cuda/batch_norm/one_read.h"
#include "cuda/batch_norm/passes.h"
#include "cuda/batch_norm/team_kernels.h"

namespace steadygrad::cuda {
namespace {

constexpr const char* kFunction = "batch_norm";

struct BackwardArguments {
  Teams teams;
  BatchNorm norm;
  BatchNormGradient grad;
};

template <class T, int kKept>
struct BackwardShared {
  union {
    alignas(16) unsigned char sums[sizeof(SharedSums<T, kKept>)];
    alignas(16) unsigned char merged[sizeof(GradientSums) * kTileThreads / 2];
  };
  GradientSums totals[kMostTeamChannels];
  Normalization<T> channels[kMostTeamChannels];
  ReluTerms<T, kKept, kMostTeamChannels / kUnit> terms;
  InputGradient<T> gradients[kMostTeamChannels];
};

template <class Access, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<Access>)
    one_read_backward_kernel(const BackwardArguments __grid_constant__ arguments) {
  using T = typename Access::Compute;
  constexpr int kKept = kKeptBy<kColumns>;
  constexpr int kAtOnce = kGradientsAtOnce<Access, kColumns>;
  using Shared = BackwardShared<T, kKept>;
  static_assert(sizeof(Shared) <= kTeamStaticBytes<T>, "what is left for units has been counted with less");
  __shared__ Shared shared;
  const Teams& teams = arguments.teams;
  const Tiles& tiles = teams.tiles;
  const BatchNorm& norm = arguments.norm;
  const BatchNormGradient& grad = arguments.grad;
  const int64_t team = blockIdx.x / tiles.splits;
  const int64_t rank = blockIdx.x % tiles.splits;
  KeptUnits<Access> inputs(teams, 0);
  KeptUnits<Access> grads(teams, 1);
  begin_team(teams, team, rank);
  int round = 0;
  for (int64_t group = team; group < tiles.groups; group += teams.count, ++round) {
    Cursor<kColumns, Access::kAligned> cursor(tiles, group, rank, threadIdx.x);
    {
      T centers[kKept];
      share_relu_terms(tiles, norm, group, cursor.x(), cursor.y(), cursor.channel(), shared.channels,
                       shared.terms, centers);
      ThreadGradientSums<T, kKept> sums = read_gradient_sums<Access, kColumns>(
          tiles, norm, grad, cursor, centers, shared.terms,
          [&](int k, const Place& place, const typename Access::Unit& unit, const T(&passed)[kUnit]) {
            inputs.put(k, unit);
            grads.put(k, Access::packed(passed));
            if (grad.grad_residual != nullptr) Access::store(grad.grad_residual, tiles.dtype, place, passed);
          });
      reduce_gradient_sums<kColumns>(sums, cursor.x(), cursor.y(), tiles.width, tiles.depth,
                                     *reinterpret_cast<SharedSums<T, kKept>*>(shared.sums));
      if (cursor.y() == 0) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          const bool exists = cursor.channel() + k < tiles.shape.channels;
          const double mean = exists ? channel_value(norm.mean, cursor.channel() + k, 0) : 0;
          shared.totals[cursor.x() * kKept + k] = channel_sums(sums, k, centers[k], mean);
        }
      }
    }
    total_of_team<GradientTotal>(teams, team, rank, round, shared.totals,
                                 reinterpret_cast<GradientSums*>(shared.merged));
    const int64_t channel = group * tiles.group_channels() + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < tiles.group_channels() && channel < tiles.shape.channels) {
      const GradientSums total = shared.totals[threadIdx.x];
      if (rank == 0) write_gradients(total, channel, norm, grad);
      const auto count = static_cast<double>(tiles.shape.count());
      shared.gradients[threadIdx.x] =
          channel_gradient<T>(norm, channel, total.grads / count, total.products / count);
    }
    __syncthreads();
    InputGradient<T> gradients[kKept];
    take_channels<kKept>(shared.gradients, cursor.x(), cursor.channel(), tiles.shape.channels, gradients);
    cursor.seek(0);
    for (int begin = 0; begin < cursor.count(); begin += kAtOnce) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const Place place = cursor.place(begin + j < cursor.count());
        cursor.advance();
        if (place.lanes == 0) continue;
        T x[kUnit];
        T values[kUnit];
        Access::unpack(inputs.get(begin + j), x);
        Access::unpack(grads.get(begin + j), values);
#pragma unroll
        for (int k = 0; k < kUnit; ++k) values[k] = gradients[kKept == 1 ? 0 : k](values[k], x[k]);
        Access::store(grad.grad_input, tiles.dtype, place, values);
      }
    }
  }
}

}  // namespace

bool backward_in_one_read(const BatchNorm& norm, const BatchNormGradient& grad, const Allocate& allocate,
                          Stream stream) {
  const Tiles tiles =
      tiles_for(kFunction, norm.shape, norm.dtype,
                are_aligned(norm.input, grad.grad_output, grad.grad_input, grad.grad_residual),
                grad.mask != nullptr, stream);
  Teams teams = plan_teams(kFunction, tiles, 2, stream);
  if (teams.count == 0) return false;
  teams.meets = teams.tiles.splits > 1;
  allocate_arena(
      allocate, [&](Arena& arena) { take_team_memory(teams, sizeof(GradientSums) / sizeof(double), arena); });
  bool launched = false;
  with_wide_access(tiles, [&](auto access, auto columns) {
    using Access = decltype(access);
    launched = launch_teams(kFunction, stream, one_read_backward_kernel<Access, decltype(columns)::value>,
                            teams, 2, sizeof(typename Access::Unit), BackwardArguments{teams, norm, grad});
  });
  return launched;
}

}  // namespace steadygrad::cuda
