// What the kernels of teams are made of, and how they are launched. This is a header of its own because that
// of cooperative groups takes three seconds to compile, which team.cu does without.
#pragma once

#include <cooperative_groups.h>
#include <cstdint>
#include <cstring>

#include "cuda/batch_norm/finish.h"
#include "cuda/batch_norm/team.h"
#include "cuda/lanes.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {

__device__ __forceinline__ uint4* kept_memory() {
#if defined(__CUDACC__)
  extern __shared__ uint4 memory[];
  return memory;
#else
  return static_cast<uint4*>(steadygrad::emulation::dynamic_shared_memory());
#endif
}

// The units of one tensor that a thread keeps for itself.
template <class Access>
class KeptUnits {
 public:
  __device__ __forceinline__ KeptUnits(const Teams& teams, int tensor)
      : memory_(kept_memory() + int64_t{tensor} * teams.kept * Access::kWords * kTileThreads + threadIdx.x) {}

  __device__ __forceinline__ void put(int k, const typename Access::Unit& unit) {
#pragma unroll
    for (int w = 0; w < Access::kWords; ++w) memory_[(k * Access::kWords + w) * kTileThreads] = unit.words[w];
  }
  __device__ __forceinline__ typename Access::Unit get(int k) const {
    typename Access::Unit unit;
#pragma unroll
    for (int w = 0; w < Access::kWords; ++w) unit.words[w] = memory_[(k * Access::kWords + w) * kTileThreads];
    return unit;
  }

 private:
  uint4* memory_;
};

// Has to be called before the first round, whose meeting is the grid's own barrier: that one needs no memory
// of ours, and publishes the zero.
__device__ __forceinline__ void begin_team(const Teams& teams, int64_t team, int64_t rank) {
  if (rank == 0 && threadIdx.x == 0) teams.arrived[team * kArrivedStride] = 0;
}

// Waits for all blocks of the team, which meet once in every round. What they wrote before can be read after
// it, by loads that pass L1 by.
__device__ __forceinline__ void meet_team(const Teams& teams, int64_t team, int round) {
  if (round == 0) {
    if (teams.meets) cooperative_groups::this_grid().sync();
    return;
  }
  if (teams.tiles.splits == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* const arrived = teams.arrived + team * kArrivedStride;
    const unsigned wanted = static_cast<unsigned>(round) * static_cast<unsigned>(teams.tiles.splits);
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < wanted) __nanosleep(40);
    __threadfence();
  }
  __syncthreads();
}

// Puts the totals of the team's blocks together, in every one of them; `totals`, in shared memory, holds this
// block's before and the team's after. The partials of two rounds are kept apart, because a block can be one
// round ahead of another.
template <class Total>
__device__ __forceinline__ void total_of_team(const Teams& teams, int64_t team, int64_t rank, int round,
                                              typename Total::Partial* totals, typename Total::Sums* shared) {
  using Partial = typename Total::Partial;
  constexpr int kNumbers = sizeof(Partial) / sizeof(double);
  const int channels = teams.tiles.group_channels();
  const int splits = teams.tiles.splits;
  double* const partials =
      teams.partials + ((round % 2) * int64_t{teams.count} + team) * splits * channels * kNumbers;
  __syncthreads();
  if (splits > 1) {
    const double* const own = reinterpret_cast<const double*>(totals);
    for (int i = threadIdx.x; i < channels * kNumbers; i += kTileThreads) {
      partials[rank * channels * kNumbers + i] = own[i];
    }
  }
  meet_team(teams, team, round);
  if (splits == 1) return;
  const int depth = kTileThreads / channels;
  const int x = threadIdx.x % channels;
  const int y = threadIdx.x / channels;
  const auto at = [&](int block) {
    double numbers[kNumbers];
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      numbers[n] = __ldcg(partials + (block * channels + x) * kNumbers + n);
    }
    Partial partial;
    memcpy(&partial, numbers, sizeof partial);
    return partial;
  };
  const Total total(at);
  typename Total::Sums sums = sum_partials(total, y < depth ? y : splits, splits, depth, at);
  for (int rows = depth; rows > 1; rows = (rows + 1) / 2) {
    const int half = (rows + 1) / 2;
    if (y >= half && y < rows) shared[(y - half) * channels + x] = sums;
    __syncthreads();
    if (y + half < rows) Total::add(sums, shared[y * channels + x]);
    __syncthreads();
  }
  if (y == 0) totals[x] = total.of(sums);
  __syncthreads();
}

// Launches a kernel of teams; false, and nothing is launched, where its blocks do not run all at a time: the
// device has too little room, or this process is given a part of it only (MPS, green contexts).
template <class Arguments>
bool launch_teams(const char* function, Stream stream, void (*kernel)(Arguments), const Teams& teams,
                  int copies, int64_t unit_bytes, const std::decay_t<Arguments>& arguments) {
  const auto bytes = static_cast<int>(int64_t{teams.kept} * copies * unit_bytes * kTileThreads);
  int multiprocessors = 0;
  int at_once = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, stream.device), function);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), function);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel, kTileThreads, bytes), function);
  if (teams.blocks() > static_cast<int64_t>(at_once) * multiprocessors) return false;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(teams.blocks()));
  config.blockDim = dim3(kTileThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // not to be found by the next call
    return false;
  }
  check(error, function);
  count_launch();
  return true;
}

}  // namespace steadygrad::cuda
