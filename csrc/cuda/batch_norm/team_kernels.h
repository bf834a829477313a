// What the kernels of teams are made of, and how they are launched. The header of cooperative groups takes
// three seconds to compile, so that the plan of teams does without.
#pragma once

#include <cooperative_groups.h>
#include <cstdint>
#include <cstring>

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

// A thread's own units of one tensor.
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

// Before the first round. The grid's own barrier, which needs no memory of ours, then shows everybody the
// zero.
__device__ __forceinline__ void begin_team(const Teams& teams, int64_t team, int64_t rank) {
  if (rank == 0 && threadIdx.x == 0) teams.arrived[team * kArrivedStride] = 0;
}

// All blocks of the team, in every round; what they wrote before can be read after it, past L1.
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

// From the totals of this block, in shared memory, to those of the team, in every block. Two rounds' partials
// are kept apart: a block that is ahead can be one round ahead.
template <class Partial, class Combine>
__device__ __forceinline__ void total_of_team(const Teams& teams, int64_t team, int64_t rank, int round,
                                              Partial* totals, Partial* shared, Combine combine) {
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
  Partial sum{};
  if (y < depth) {
#pragma unroll 4
    for (int block = y; block < splits; block += depth) {
      double numbers[kNumbers];
#pragma unroll
      for (int n = 0; n < kNumbers; ++n) {
        numbers[n] = __ldcg(partials + (block * channels + x) * kNumbers + n);
      }
      Partial partial;
      memcpy(&partial, numbers, sizeof partial);
      combine(sum, partial);
    }
  }
  for (int rows = depth; rows > 1; rows = (rows + 1) / 2) {
    const int half = (rows + 1) / 2;
    if (y >= half && y < rows) shared[(y - half) * channels + x] = sum;
    __syncthreads();
    if (y + half < rows) combine(sum, shared[y * channels + x]);
    __syncthreads();
  }
  if (y == 0) totals[x] = sum;
  __syncthreads();
}

// Launches a kernel of teams; false, and nothing is launched, where its blocks do not fit on the device at a
// time.
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
  check(cudaLaunchKernelEx(&config, kernel, arguments), function);
  count_launch();
  return true;
}

}  // namespace steadygrad::cuda
